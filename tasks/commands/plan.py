"""`cf plan`: what each training stage needs in memory, operations, hours and disk, before anything is started.

All of it is arithmetic on params.yaml (cf_model/plan/cost.py, need.py); nothing is loaded and no GPU is needed. A training stage asks
here before it starts, and is refused if it can't fit.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from cf_model.codec.interface import SPACE
from cf_model.model.checkpoint import CHECKPOINTS_TO_KEEP
from cf_model.plan import hardware, need, table
from cf_model.plan.cost import ModelCosts
from cf_model.plan.encoding import PAPER_CLIPS, EncodingNeed, estimate_clip
from cf_model.plan.fit import WorkSplit, refuse_disk, refuse_memory
from cf_model.plan.hardware import Hardware
from cf_model.plan.need import StageNeed
from cf_model.plan.table import format_bytes
from tasks.files.options import parse_options
from tasks.files.settings import read_settings
from tasks.files.videos import list_videos
from tasks.files.words import count_things
from tasks.params.load import load_params
from tasks.params.schema import Params
from tasks.params.yaml_file import Refused, refuse_errors

WAN_CHANNELS = 16  # of a latent frame of Wan's codec


def estimate_costs(p: Params) -> ModelCosts:
    """Return the costs of the model at the video's latent size."""
    channels = WAN_CHANNELS if p.codec.kind == "wan" else p.codec.linear.channels
    size = {"height": p.video.height // SPACE, "width": p.video.width // SPACE}
    text = {"text_channels": p.text.channels, "text_tokens": p.text.tokens}
    return ModelCosts(p.model, channels=channels, **text, **size, compute=p.compute)


def estimate_needs(p: Params) -> dict[str, StageNeed]:
    """Return the need of every stage that trains."""
    one, view = estimate_costs(p), p.teacher.view
    needs = {"base": need.estimate_base(p.base, one)} if p.base.init == "scratch" else {}
    needs |= {"teacher": need.estimate_teacher(p.teacher, one), "causal_init": need.estimate_causal_init(p.causal_init, one)}
    return needs | {stage: need.estimate_student(getattr(p, stage), one, view) for stage in ("stage1", "stage2")}


def estimate_disk(p: Params, stage: str, one: StageNeed) -> dict[str, float]:
    """Return the bytes that a training stage writes: its out, and checkpoints, the newest ones and the one being written."""
    saves = int(getattr(p, stage).save_every) < getattr(p, stage).steps
    return {"out": 4.0 * estimate_costs(p).parameters, "checkpoints": (CHECKPOINTS_TO_KEEP + 1.0) * one.checkpoint if saves else 0.0}


def estimate_encoding(p: Params) -> EncodingNeed:
    """Return what a whole clip's latents take, without its caption's embedding, which is as long as the caption."""
    size = (estimate_costs(p).channels, p.video.height, p.video.width)
    return estimate_clip(p.codec.kind, p.clips.frames, size, p.encode.dtype, p.encode.shard_mib)


def count_clips(p: Params) -> int:
    """Return how many clips there are before the filter: those to be rendered or fetched, or the videos in the user's folder."""
    if p.clips.source not in ("folder", "table"):
        return p.clips.count
    return len(list_videos(p.clips.folder)) if p.clips.folder else 0


def forecast_stages(p: Params, machine: Hardware) -> list[dict[str, Any]]:
    """Return a row for each training stage."""
    needs = estimate_needs(p).items()
    return [table.forecast_stage(stage, one, machine, estimate_disk(p, stage, one), p.engine.micro_batch) for stage, one in needs]


def estimate_checkpointed(p: Params, stage: str) -> StageNeed | None:
    """Return the need of a stage with activation checkpointing, or None if that is on already."""
    leaner = p.model_copy(update={"compute": replace(p.compute, checkpointing=True)})
    return None if p.compute.checkpointing else estimate_needs(leaner)[stage]


def refuse_unfit_stage(p: Params, stage: str, out: Path, work: Path) -> None:
    """Raise Refused before a training stage begins that can't end here; CF_IGNORE_PLAN=1 skips this."""
    if read_settings().ignore_plan or (one := estimate_needs(p).get(stage)) is None:
        return
    ranks = int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    gpu = hardware.count_gpus() > 0
    free = hardware.measure_memory() / (1 if gpu else ranks)  # ranks on the CPU have one machine's memory
    where = "GPU" if gpu else "machine" if ranks == 1 else "rank's share of the machine"
    split = WorkSplit.from_engine(p.engine, one.batch, ranks, gpu=gpu)
    with refuse_errors("; CF_IGNORE_PLAN=1 starts it all the same"):
        refuse_memory(stage, one, estimate_checkpointed(p, stage), free, where, split)
        refuse_disk(stage, estimate_disk(p, stage, one), out, work)


def format_plan(p: Params, machine: Hardware) -> str:
    """Return what `cf plan` prints: time and disk of each stage, and memory by ZeRO stage."""
    stages, one, clip, many = forecast_stages(p, machine), estimate_costs(p), estimate_encoding(p), count_clips(p)
    frame = f"a latent frame is {one.tokens} tokens and {format_bytes(one.frame_bytes())}"
    all_clips = f"{count_things(many, 'clip')}: {clip.format_line(many, machine)}" if many else f"no video lies in {p.clips.folder} yet"
    lines = [
        f"profile {p.profile}: {one.parameters:,} parameters a network; {frame} of keys and values a sample",
        f"compute: products in {p.compute.dtype}, checkpointing {'on' if p.compute.checkpointing else 'off'}",
        f"hardware: {machine.description}",
        "",
        *table.format_times(stages, machine),
        f"latents of a clip: {format_bytes(clip.clip_bytes)}; {all_clips}",
        f"the paper's {PAPER_CLIPS:,} clips: {clip.format_line(PAPER_CLIPS, machine)} without decoding",
        "",
        *table.format_memory(stages, machine),
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    args = parse_options("plan", argv, __doc__)
    if args.gpus is not None and args.gpus < 0:
        raise Refused(f"--gpus is {args.gpus}; use 0 for the CPU, or 1 and more")
    if not 0 < args.utilisation <= 1:
        raise Refused(f"--utilisation is {args.utilisation}; it is a share of the peak: use a value above 0 and at most 1")
    for name in ("gpu_memory", "tflops"):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise Refused(f"--{name.replace('_', '-')} is {value}; use a value above 0")
    p = load_params(args.params)
    machine = hardware.describe_hardware(args.gpus, args.gpu_memory, args.tflops, args.utilisation)
    if args.json:
        print(json.dumps({"profile": p.profile, "hardware": machine.description, "stages": forecast_stages(p, machine)}, indent=1))
    else:
        print(format_plan(p, machine))
