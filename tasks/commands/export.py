"""`cf export`: a model of ours in one folder with all that it needs, or in the layout of another project."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = """examples:
  cf export --to diffusers --model models/stage2 --out out/student
  cf export --to diffusers --model models/wan --system stage2 --params profiles/wan-1.3b.yaml --codec WAN/vae --text WAN --out out/wan
  cf export --to self-forcing --model models/stage2 --out stage2.pt
  cf export --to self-forcing --model models/stage2 --out stage2.safetensors

diffusers: a folder with transformer, codec or VAE, text encoder, and the memory and rollout settings of a system in the
params file: all that `cf generate --model` and ContextForcingPipeline.from_pretrained need.

self-forcing: original Wan's names. A .pt holds them with `model.` before each, under generator and generator_ema, so that
Self-Forcing's inference finds them with --use_ema and without; a .safetensors holds them flat."""


def main(argv: list[str]) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("cf export", description=__doc__, epilog=EXAMPLES, formatter_class=form)
    parser.add_argument("--to", choices=("diffusers", "self-forcing"), required=True)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a folder that a stage or cf import-weights wrote")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for diffusers, a new file for self-forcing")
    only = parser.add_argument_group("only --to diffusers")
    only.add_argument("--params", type=Path, default=Path("params.yaml"), metavar="FILE", help="default: params.yaml")
    only.add_argument("--system", metavar="NAME", help="of generate.systems, or a stage: whose memory and rollout; default: as --model")
    only.add_argument("--codec", type=Path, metavar="DIR", help="default: models/codec; or Wan's own VAE")
    only.add_argument("--text", type=Path, metavar="DIR", help="with text_encoder/ and tokenizer/; default: text in the params file")
    only.add_argument("--licence", help="of the weights, for the model card; default: Apache-2.0, for imported ones: other")
    stated = parser.parse_args(argv)
    if stated.to == "self-forcing":
        print(self_forcing(stated.model, stated.out))
        return
    from .pretrained import to_diffusers

    print(to_diffusers(stated.model, stated.out, stated.params, stated.system, stated.codec, stated.text, stated.licence))


def self_forcing(model: Path, out: Path) -> str:
    """Writes one file and says what is in it."""
    if out.suffix not in (".pt", ".safetensors"):
        raise ValueError(f"--out is {out}; --to self-forcing writes a .pt or a .safetensors")
    if out.exists():
        raise ValueError(f"--out is {out}, which is there; name a new file")

    import torch  # after the options
    from safetensors.torch import save_file

    from cf_model.foreign import import_checkpoint, weight_names

    weights = import_checkpoint.read_weights(model)
    state = weight_names.to_self_forcing(weights.state)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")
    try:
        if out.suffix == ".safetensors":
            save_file(state, partial, metadata={"format": "pt"})
        else:
            branch = {f"model.{name}": tensor for name, tensor in state.items()}
            torch.save({"generator": branch, "generator_ema": branch}, partial)
        partial.rename(out)
    finally:
        partial.unlink(missing_ok=True)
    heads, head_dim = weights.config["num_attention_heads"], weights.config["attention_head_dim"]
    odd = "" if head_dim == weight_names.HEAD_DIM else f"; it can't say that heads are {head_dim} wide: import it with --heads {heads}"
    return f"{out}: {len(state)} tensors under Self-Forcing's names{odd}"

