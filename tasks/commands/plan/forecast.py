"""Forecast of what the training stages of a params.yaml need, as numbers; and the refusal of a stage that can't fit here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cf_model.codec.interface import SPACE, latent_frames
from cf_model.model.checkpoint import CHECKPOINTS_TO_KEEP
from cf_model.plan import need
from cf_model.plan.cost import ModelCosts
from cf_model.plan.need import ZERO_STAGES, StageNeed
from tasks.files.settings import read_settings
from tasks.files.videos import list_videos
from tasks.params.schema import Params

from . import limits
from .limits import GIB

WAN_CHANNELS = 16  # of a latent frame of Wan's codec


@dataclass(frozen=True)
class Hardware:
    """What the stages will run on."""

    ranks: int
    memory: float  # bytes of one rank
    tflops: float  # that one rank reaches
    unit: str  # GPU or CPU
    description: str


def estimate_costs(p: Params) -> ModelCosts:
    """Return the costs of the model at the video's latent size."""
    channels = WAN_CHANNELS if p.codec.kind == "wan" else p.codec.linear.channels
    size = {"height": p.video.height // SPACE, "width": p.video.width // SPACE}
    text = {"text_channels": p.text.channels, "text_tokens": p.text.tokens}
    return ModelCosts(p.model, channels=channels, **text, **size, compute=p.compute)


def estimate_needs(p: Params) -> dict[str, StageNeed]:
    """Return the need of every stage that trains."""
    one, needs = estimate_costs(p), dict[str, StageNeed]()
    if p.base.init == "scratch":
        needs["base"] = need.estimate_base(p.base, one)
    needs["teacher"] = need.estimate_teacher(p.teacher, one)
    needs["causal_init"] = need.estimate_causal_init(p.causal_init, one)
    needs["stage1"] = need.estimate_student(p.stage1, one, p.teacher.view)
    needs["stage2"] = need.estimate_student(p.stage2, one, p.teacher.view)
    return needs


def estimate_disk(p: Params, stage: str) -> dict[str, float]:
    """Return the bytes that a training stage writes: its out, and checkpoints, the newest ones and the one being written."""
    one, saves = estimate_needs(p)[stage], int(getattr(p, stage).save_every) < getattr(p, stage).steps
    return {"out": 4.0 * estimate_costs(p).parameters, "checkpoints": (CHECKPOINTS_TO_KEEP + 1.0) * one.checkpoint if saves else 0.0}


def estimate_clip_bytes(p: Params) -> float:
    """Return the bytes of a whole clip's latents, without its caption's embedding, which is as long as the caption."""
    one, number = estimate_costs(p), 4 if p.encode.dtype == "float32" else 2
    return number * latent_frames(p.clips.frames) * one.channels * one.height * one.width


def count_clips(p: Params) -> int:
    """Return how many clips there are before the filter: those to be rendered, or the videos in the user's folder."""
    if p.clips.source == "worlds":
        return p.clips.count
    return len(list_videos(p.clips.folder)) if p.clips.folder else 0


def list_micro_batches(batch: int, ranks: int) -> list[int]:
    """List the numbers of samples that a rank may compute at once: its share of the batch in equal parts, largest first."""
    share = max(1, batch // ranks)
    return [share // n for n in range(1, share + 1) if share % n == 0]


def find_fitting_batch(one: StageNeed, memory: float, zero: int, ranks: int, stated: int | None = None) -> int:
    """Return the stated number of samples at once, or without it the largest that fits; 0 if that does not fit."""
    return next((n for n in ([stated] if stated else list_micro_batches(one.batch, ranks)) if one.peak(n, zero, ranks) <= memory), 0)


def estimate_hours(one: StageNeed, machine: Hardware) -> float:
    """Return the hours of a stage at the speed that the hardware reaches."""
    return one.total / (machine.ranks * machine.tflops * 1e12) / 3600


def forecast_stages(p: Params, machine: Hardware) -> Iterator[dict[str, Any]]:
    """Yield a row for each training stage, as `cf plan --json` prints it."""
    for stage, one in estimate_needs(p).items():
        states: dict[str, dict[str, float]] = {}
        for zero in ZERO_STAGES:
            at_once = find_fitting_batch(one, machine.memory, zero, machine.ranks, p.engine.micro_batch)
            parts_of = {name: size / GIB for name, size in one.states(zero, machine.ranks).items()}
            peak = one.peak(max(1, at_once), zero, machine.ranks) / GIB
            states[str(zero)] = parts_of | {"at_once": at_once, "peak": peak}
        yield {
            "stage": stage,
            "parameters": one.trained + one.frozen + one.averaged,
            "trained": one.trained,
            "steps": one.steps,
            "batch": one.batch,
            "gib": states,
            "gib_of_a_sample": {"keys_values": one.memory / GIB, "activations": one.activations / GIB, "latents": one.latents / GIB},
            "gib_shared": one.shared / GIB,
            "tflop_per_step": one.operations * one.batch / 1e12,
            "tflop_per_sample": one.operations / 1e12,
            "hours": estimate_hours(one, machine),
            "disk_gib": {name: written / GIB for name, written in estimate_disk(p, stage).items()},
        }


def estimate_checkpointed(p: Params, stage: str) -> StageNeed | None:
    """Return the need of a stage with activation checkpointing, or None if that is on already."""
    leaner = p.model_copy(update={"compute": replace(p.compute, checkpointing=True)})
    return None if p.compute.checkpointing else estimate_needs(leaner)[stage]


def refuse_unfit_stage(p: Params, stage: str, out: Path, work: Path) -> None:
    """Raise Refused before a training stage begins that can't end here; CF_IGNORE_PLAN=1 skips this."""
    if read_settings().ignore_plan or (one := estimate_needs(p).get(stage)) is None:
        return
    ranks = int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    free = limits.measure_memory() / (1 if limits.count_gpus() else ranks)  # ranks on the CPU have one machine's memory
    where = "GPU" if limits.count_gpus() else "machine" if ranks == 1 else "rank's share of the machine"
    split = limits.WorkSplit.from_engine(p.engine, one.batch, ranks, gpu=limits.count_gpus() > 0)
    limits.refuse_memory(stage, one, estimate_checkpointed(p, stage), free, where, split)
    limits.refuse_disk(stage, estimate_disk(p, stage), out, work)
