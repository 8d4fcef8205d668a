"""`cf export`: a trained or imported model as a folder with all that it needs, or in the layout of another project."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.files.atomic import open_partial
from tasks.files.options import parse_options
from tasks.files.words import count_things
from tasks.params.yaml_file import Refused

if TYPE_CHECKING:
    from tasks.params.schema import Params, System

CODEC_FOLDER = Path("models/codec")


def main(argv: list[str]) -> None:
    args = parse_options("export", argv, __doc__)
    print(export_self_forcing(args.model, args.out) if args.to == "self-forcing" else export_diffusers(args))


# Imports of torch and of what imports it are in the functions, so that --help does not wait for them.


def export_self_forcing(model: Path, out: Path) -> str:
    """Write the weights to one file under Self-Forcing's names and return a sentence for the user."""
    if out.suffix not in (".pt", ".safetensors"):
        raise ValueError(f"--out is {out}; --to self-forcing writes a .pt or a .safetensors")
    if out.exists():
        raise ValueError(f"--out is {out}, which is there; name a new file")

    from cf_model.foreign.weight_names import HEAD_DIM
    from cf_model.foreign.write_checkpoint import write_self_forcing

    out.parent.mkdir(parents=True, exist_ok=True)
    with open_partial(out) as partial:
        count, config = write_self_forcing(model, partial, flat=out.suffix == ".safetensors")
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    odd = "" if head_dim == HEAD_DIM else f"; it can't say that heads are {head_dim} wide: import it with --heads {heads}"
    return f"{out}: {count_things(count, 'tensor')} under Self-Forcing's names{odd}"


def export_diffusers(args: argparse.Namespace) -> str:
    """Write a model folder for `cf video` and return a sentence for the user.

    Weights come from --model, memory and rollout from a system in the params file, codec and text encoder from there too.
    """
    model, out, name = args.model, args.out, args.system or args.model.name
    if out.exists():
        raise Refused(f"--out is {out}, which is there; name a new folder")
    if not (model / "config.json").is_file():
        raise Refused(f"--model is {model}, which holds no transformer; name one that a stage or cf import-weights wrote")
    if args.codec is None and not CODEC_FOLDER.is_dir():
        raise Refused(f"{CODEC_FOLDER} is not there; run the stage codec, or name a codec's folder with --codec")

    from cf_model.codec.codec_file import load_codec
    from cf_model.codec.wan_codec import load_wan_codec
    from cf_model.folder import Recipe, describe_origin
    from cf_model.model import wan
    from cf_model.pipeline import ContextForcingPipeline
    from tasks.params import load
    from tasks.parts.text_encoder import open_text_encoder

    params = load.load_params(args.params)
    system = find_system(params, name)
    if model.name in ("base", "teacher") and not (model / "import.json").is_file():
        problem = f"--model is {model}, which the stage {model.name} made: a bidirectional model, which can't be run as {name}"
        raise Refused(f"{problem}; name models/stage2, or another causal model")
    rollout = params.stage2.rollout if system.weights == "stage2" else params.stage1.rollout  # as in the stage generate
    made, licence = describe_origin(model, name, params.profile, params.seed)
    assert system.memory is not None
    video, licence = params.video.model_dump(), args.licence or licence
    recipe = Recipe(system.memory, rollout.chunk, rollout.levels, params.flow, **video, made=made, licence=licence)
    text = params.text.model_copy(update={"kind": "umt5", "weights": str(args.text)}) if args.text else params.text
    folder = args.codec or CODEC_FOLDER
    codec = load_codec(folder) if (folder / "codec.json").is_file() else load_wan_codec(folder)  # our stage's, or Wan's own VAE
    ContextForcingPipeline(wan.load_transformer(model), codec, open_text_encoder(text), recipe).save_pretrained(out)
    facts = f"{out}: {recipe.width} x {recipe.height}, memory and rollout of {name} in {args.params}"
    return f"{facts}; now `cf video --model {out} --prompt ... --out video.mp4`"


def find_system(params: Params, name: str) -> System:
    """Return a causal system of generate.systems, or one of a causal stage's own memory, by its name; refuse an unknown name."""
    from tasks.params.schema import CAUSAL, System
    from tasks.parts.systems import as_trained

    systems = {stage: System(weights=stage, memory=getattr(params, stage).memory, view=None, frames=1) for stage in CAUSAL}
    systems |= {key: as_trained(params, system) for key, system in params.generate.systems.items() if system.weights in CAUSAL}
    if name not in systems:
        raise Refused(f"{name!r} is none of {', '.join(systems)}; say with --system which of them --model is run as")
    return systems[name]
