"""What params.yaml means for a machine: costs and needs of all training stages, and the forecast that `cf plan` prints.

`p` is all of params.yaml by its sections (tasks/params/schema.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cf_model.codec.interface import SPACE
from cf_model.model.checkpoint import CHECKPOINTS_TO_KEEP

from . import hardware, need, table
from .cost import ModelCosts
from .encoding import PAPER_CLIPS, EncodingNeed, estimate_clip
from .fit import WorkSplit, refuse_disk, refuse_memory
from .hardware import Hardware
from .need import StageNeed
from .table import format_bytes

WAN_CHANNELS = 16  # of a latent frame of Wan's codec


def count_channels(p: Any) -> int:
    """Return the channels of a latent frame of the codec that the parameters name."""
    return int(WAN_CHANNELS if p.codec.kind == "wan" else p.codec.linear.channels)


def estimate_costs(p: Any) -> ModelCosts:
    """Return the costs of the model at the video's latent size."""
    size = {"height": p.video.height // SPACE, "width": p.video.width // SPACE}
    text = {"text_channels": p.text.channels, "text_tokens": p.text.tokens}
    return ModelCosts(p.model, channels=count_channels(p), **text, **size, compute=p.compute)


def list_estimates(p: Any) -> dict[str, Callable[[], StageNeed]]:
    """Return what estimates the need of each stage that trains; an estimate follows a memory over every length and takes a moment."""
    one, view = estimate_costs(p), p.teacher.view
    estimates: dict[str, Callable[[], StageNeed]] = {"base": partial(need.estimate_base, p.base, one)} if p.base.init == "scratch" else {}
    estimates |= {"teacher": partial(need.estimate_teacher, p.teacher, one)}
    estimates |= {"causal_init": partial(need.estimate_causal_init, p.causal_init, one)}
    return estimates | {stage: partial(need.estimate_student, getattr(p, stage), one, view) for stage in ("stage1", "stage2")}


def estimate_needs(p: Any) -> dict[str, StageNeed]:
    """Return the need of every stage that trains."""
    return {stage: estimate() for stage, estimate in list_estimates(p).items()}


def estimate_disk(p: Any, stage: str, one: StageNeed) -> dict[str, float]:
    """Return the bytes that a training stage writes: its out, and checkpoints, the newest ones and the one being written."""
    saves = int(getattr(p, stage).save_every) < getattr(p, stage).steps
    return {"out": 4.0 * estimate_costs(p).parameters, "checkpoints": (CHECKPOINTS_TO_KEEP + 1.0) * one.checkpoint if saves else 0.0}


def estimate_encoding(p: Any) -> EncodingNeed:
    """Return what a whole clip's latents take, without its caption's embedding, which is as long as the caption."""
    size = (count_channels(p), p.video.height, p.video.width)
    return estimate_clip(p.codec.kind, p.clips.frames, size, p.encode.dtype, p.encode.shard_mib)


def forecast_stages(p: Any, machine: Hardware) -> list[dict[str, Any]]:
    """Return a row for each training stage."""
    needs = estimate_needs(p).items()
    return [table.forecast_stage(stage, one, machine, estimate_disk(p, stage, one), p.engine.micro_batch) for stage, one in needs]


def estimate_checkpointed(p: Any, stage: str) -> StageNeed | None:
    """Return the need of a stage with activation checkpointing, or None if that is on already."""
    leaner = p.model_copy(update={"compute": replace(p.compute, checkpointing=True)})
    return None if p.compute.checkpointing else list_estimates(leaner)[stage]()


def refuse_unfit(p: Any, stage: str, out: Path, work: Path, ranks: int) -> None:
    """Raise ValueError for a training stage that needs more memory or disk than this machine, with its `ranks` processes, has left.

    `out` and `work` are the folders that the stage writes to; a stage that does not train always fits.
    """
    if (estimate := list_estimates(p).get(stage)) is None:
        return
    one = estimate()
    gpu = hardware.count_gpus() > 0
    free = hardware.measure_memory() / (1 if gpu else ranks)  # ranks on the CPU have one machine's memory
    where = "GPU" if gpu else "machine" if ranks == 1 else "rank's share of the machine"
    refuse_memory(stage, one, estimate_checkpointed(p, stage), free, where, WorkSplit.from_engine(p.engine, one.batch, ranks, gpu=gpu))
    refuse_disk(stage, estimate_disk(p, stage, one), out, work)


def format_plan(p: Any, machine: Hardware, clips: int) -> str:
    """Return what `cf plan` prints: time and disk of each stage, and memory by ZeRO stage. `clips`: how many there are to encode."""
    stages, one, clip = forecast_stages(p, machine), estimate_costs(p), estimate_encoding(p)
    frame = f"a latent frame is {one.tokens} tokens and {format_bytes(one.frame_bytes())}"
    to_encode = f"{clips} clip{'s' * (clips != 1)}: {clip.format_line(clips, machine)}"
    here = to_encode if clips else f"no video lies in {p.clips.folder} yet"
    lines = [
        f"profile {p.profile}: {one.parameters:,} parameters a network; {frame} of keys and values a sample",
        f"compute: products in {p.compute.dtype}, checkpointing {'on' if p.compute.checkpointing else 'off'}",
        f"hardware: {machine.description}",
        "",
        *table.format_times(stages, machine),
        f"latents of a clip: {format_bytes(clip.clip_bytes)}; {here}",
        f"the paper's {PAPER_CLIPS:,} clips: {clip.format_line(PAPER_CLIPS, machine)} without decoding",
        "",
        *table.format_memory(stages, machine),
    ]
    return "\n".join(lines)
