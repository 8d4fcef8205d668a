"""`cf export --to diffusers`: what the stages made, or `cf import-weights` did, as one model folder that `cf generate` runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tasks.params import load
from tasks.params.schema import CAUSAL, Params, System
from tasks.params.yaml_file import Refused
from tasks.parts.systems import as_trained

CODEC = Path("models/codec")


def to_diffusers(model: Path, out: Path, file: Path, system: str | None, codec: Path | None, text: Path | None, licence: str | None) -> str:
    """Weights from `model`; memory and rollout of a system in a params file; its codec and text encoder."""
    if out.exists():
        raise Refused(f"--out is {out}, which is there; name a new folder")
    if not (model / "config.json").is_file():
        raise Refused(f"--model is {model}, which holds no transformer; name one that a stage or cf import-weights wrote")
    if codec is None and not CODEC.is_dir():
        raise Refused(f"{CODEC} is not there; run the stage codec, or name a codec's folder with --codec")
    params = load.load_params(file)

    from cf_model.folder import Recipe  # after the options, as they import torch
    from cf_model.model import wan
    from cf_model.pipeline import ContextForcingPipeline

    run = chosen(params, system or model.name)
    rollout = params.stage2.rollout if run.weights == "stage2" else params.stage1.rollout  # as the stage generate runs it
    made, usual = origin(model, system or model.name, params)
    assert run.memory is not None
    recipe = Recipe(
        memory=run.memory,
        chunk=rollout.chunk,
        levels=rollout.levels,
        flow=params.flow,
        fps=params.video.fps,
        height=params.video.height,
        width=params.video.width,
        made=made,
        licence=licence or usual,
    )
    pipe = ContextForcingPipeline(wan.load_transformer(model), read_codec(codec or CODEC), read_text(params, text), recipe)
    pipe.save_pretrained(out)
    said = f"{out}: {recipe.width} x {recipe.height}, memory and rollout of {system or model.name} in {file}"
    return f"{said}; now `cf generate --model {out} --prompt ... --out video.mp4`"


def chosen(params: Params, name: str) -> System:
    """A causal system that the stage `generate` runs, or a stage's own; with the memory that it is run with."""
    trained = {stage: System(weights=stage, memory=getattr(params, stage).memory, view=None, frames=1) for stage in CAUSAL}
    known = trained | {one: as_trained(params, system) for one, system in params.generate.systems.items() if system.weights in CAUSAL}
    if name not in known:
        raise Refused(f"{name!r} is none of {', '.join(known)}; say with --system which of them --model is run as")
    return known[name]


def origin(model: Path, system: str, params: Params) -> tuple[str, str]:
    """For the model card: how the weights were made, and their licence unless a person says another."""
    found = model / "import.json"
    if not found.is_file():
        return f"By the stage `{system}` of context-forcing's pipeline, profile `{params.profile}`, seed {params.seed}.", "Apache-2.0"
    facts: dict[str, Any] = json.loads(found.read_text())
    source = Path(str(facts.get("source", "unknown"))).name
    made = f"Not by this project: imported from {source} ({facts.get('layout', 'unknown')})"
    return f"{made}, run with the settings of `{system}` in profile `{params.profile}`.", "other"


def read_codec(folder: Path) -> Any:
    """What `save_codec` wrote, or Wan's own VAE as it is published."""
    from cf_model.codec.codec_file import load_codec

    if (folder / "codec.json").is_file():
        return load_codec(folder)
    from cf_model.codec.wan_codec import load_wan_codec

    return load_wan_codec(folder)


def read_text(params: Params, folder: Path | None) -> Any:
    from tasks.parts.text_encoder import open_text_encoder

    return open_text_encoder(params.text if folder is None else params.text.model_copy(update={"kind": "umt5", "weights": str(folder)}))
