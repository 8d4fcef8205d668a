"""`cf plan`: what each training stage needs in memory, operations, hours and disk, before anything is started.

All of it is arithmetic on params.yaml (cf_model/plan/cost.py, need.py); nothing is loaded and no GPU is needed. A training stage asks
here before it starts, and is refused if it can't fit.
"""

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from cf_model.codec.interface import SPACE, latent_frames
from cf_model.model.checkpoint import CHECKPOINTS_TO_KEEP
from cf_model.plan import need
from cf_model.plan.cost import ModelCosts
from cf_model.plan.fit import GIB, WorkSplit, format_number, list_micro_batches, suggest_remedy
from cf_model.plan.need import ZERO_STAGES, StageNeed
from tasks.files.settings import read_settings
from tasks.files.videos import list_videos
from tasks.files.words import count_things
from tasks.params.load import load_params
from tasks.params.schema import Params
from tasks.params.yaml_file import Refused

MIB = 2**20
# Choice: what the plan expects may be a third too much before a stage is refused; it was within a quarter wherever it was
# measured (benchmarks/plan_memory.py), and a stage that would have fitted must never be refused.
MEMORY_MARGIN = 1.5
DISK_MARGIN = 1.1
CGROUPS = (  # limit and use, version 2 and 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
WAN_CHANNELS = 16  # of a latent frame of Wan's codec
# TFLOP/s that a process reaches in profile tiny on one core of an Intel Xeon: 26 to 38 GFLOP/s (benchmarks/results/plan-hours.json)
CPU_TFLOPS = 0.032
H100_TFLOPS = 989.0  # TFLOP/s, bfloat16, by its data sheet
UTILISATION = 0.35
DEFAULT_MEMORY = 80.0  # GiB of a GPU that is neither here nor described
EXAMPLES = """examples:
  cf plan                                       this machine, params.yaml
  cf plan --params profiles/wan-1.3b.yaml --gpus 8 --gpu-memory 80
  cf plan --gpus 64 --gpu-memory 141 --utilisation 0.4 --json

networks      all of a stage's parameters: trained, frozen (the teacher of stage1 and stage2) and averaged
weights       in float32, and bfloat16 copies where products are in it
optimiser     two numbers a parameter (AdamW); with ZeRO also the master weights that DeepSpeed keeps
ZeRO          shares among the GPUs: 1 the optimiser, 2 the averaged gradients too, 3 the weights too; average and teacher stay whole
keys, values  of the remembered frames, and activations: of the samples that a GPU computes at once
at once       engine.micro_batch, or the largest part of a GPU's share of the batch that fits; `1 too many`: it does not fit
TFLOP         matrix products of the whole batch, a multiply-add as two, a backward pass as two forward passes
checkpoints   the newest two, and the one being written

Not counted: codec, text encoder, data loading, communication, memory that an allocator can't use again, and the generation and
evaluation of videos. Keep a tenth of the memory free."""


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
    one, view = estimate_costs(p), p.teacher.view
    needs = {"base": need.estimate_base(p.base, one)} if p.base.init == "scratch" else {}
    needs |= {"teacher": need.estimate_teacher(p.teacher, one), "causal_init": need.estimate_causal_init(p.causal_init, one)}
    return needs | {stage: need.estimate_student(getattr(p, stage), one, view) for stage in ("stage1", "stage2")}


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


def estimate_hours(one: StageNeed, machine: Hardware) -> float:
    """Return the hours of a stage at the speed that the hardware reaches."""
    return one.total / (machine.ranks * machine.tflops * 1e12) / 3600


def forecast_stages(p: Params, machine: Hardware) -> Iterator[dict[str, Any]]:
    """Yield a row for each training stage, as `cf plan --json` prints it."""
    for stage, one in estimate_needs(p).items():
        states: dict[str, dict[str, float]] = {}
        candidates = [p.engine.micro_batch] if p.engine.micro_batch else list_micro_batches(one.batch, machine.ranks)
        for zero in ZERO_STAGES:
            at_once = next((n for n in candidates if one.peak(n, zero, machine.ranks) <= machine.memory), 0)  # 0: none fits
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


def count_gpus() -> int:
    """Return the number of GPUs that torch can use."""
    return torch.cuda.device_count()


def measure_memory() -> float:
    """Return the bytes of the device that a stage computes on: all of a GPU, or what is free of the CPU's, in a container of its share."""
    if count_gpus():
        return float(torch.cuda.get_device_properties(0).total_memory)
    free = [float(psutil.virtual_memory().available)]
    for limit, used in CGROUPS:
        try:
            free.append(float(Path(limit).read_text()) - float(Path(used).read_text()))
        except (OSError, ValueError):  # no such file, or its word is `max`
            continue
    return min(free)


def refuse_memory(stage: str, one: StageNeed, leaner: StageNeed | None, free: float, where: str, split: WorkSplit) -> None:
    """Raise Refused if a stage needs more than `MEMORY_MARGIN` times the `free` bytes of a rank.

    `leaner`: the need with activation checkpointing, where that is off. `where`: whose memory it is, for the sentence.
    """
    expected = split.peak(one)
    if expected <= MEMORY_MARGIN * free:
        return
    fixed, each = format_number(split.peak(one, 0) / GIB), format_number(one.sample_bytes() / GIB)
    parts = f"{fixed} for networks, gradients and optimisers and {each} for each of {split.at_once} samples at once"
    rank = f"a rank of {stage} of {split.ranks} with ZeRO {split.zero}" if split.ranks > 1 else stage
    need = f"{rank} needs about {format_number(expected / GIB)} GiB ({parts}), but this {where} has {format_number(free / GIB)}"
    raise Refused(f"{need}; {suggest_remedy(one, leaner, free, split)}; CF_IGNORE_PLAN=1 starts it all the same")


def refuse_disk(stage: str, written: dict[str, float], out: Path, work: Path) -> None:
    """Raise Refused if a disk is too small for a stage's out or checkpoints, or for both where they lie on the same disk.

    Checkpoints of an earlier attempt make room, because new ones replace them.
    """
    wanted: dict[int, tuple[Path, float]] = {}
    reused = sum(file.stat().st_size for file in work.rglob("*.safetensors"))
    for path, size in ((out, written["out"]), (work, max(0.0, written["checkpoints"] - reused))):
        home = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
        device = home.stat().st_dev
        wanted[device] = (home, wanted.get(device, (home, 0.0))[1] + size)
    for home, size in wanted.values():
        free = shutil.disk_usage(home).free
        if size > free * DISK_MARGIN:
            problem = f"{stage} writes up to {format_number(size / GIB)} GiB, but the disk of {home} has {format_number(free / GIB)} free"
            raise Refused(f"{problem}; free some, or put the project on a larger disk; CF_IGNORE_PLAN=1 starts it all the same")


def refuse_unfit_stage(p: Params, stage: str, out: Path, work: Path) -> None:
    """Raise Refused before a training stage begins that can't end here; CF_IGNORE_PLAN=1 skips this."""
    if read_settings().ignore_plan or (one := estimate_needs(p).get(stage)) is None:
        return
    ranks = int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    gpu = count_gpus() > 0
    free = measure_memory() / (1 if gpu else ranks)  # ranks on the CPU have one machine's memory
    where = "GPU" if gpu else "machine" if ranks == 1 else "rank's share of the machine"
    split = WorkSplit.from_engine(p.engine, one.batch, ranks, gpu=gpu)
    refuse_memory(stage, one, estimate_checkpointed(p, stage), free, where, split)
    refuse_disk(stage, estimate_disk(p, stage), out, work)


def format_table(p: Params, machine: Hardware) -> str:
    """Return the two tables of `cf plan`: time and disk of each stage, and memory by ZeRO stage."""
    stages, one = list(forecast_stages(p, machine)), estimate_costs(p)
    small = max(row["gib"]["0"]["peak"] for row in stages) < 1
    scale, unit = (GIB / MIB, "MiB") if small else (1.0, "GiB")
    clip, frame = estimate_clip_bytes(p), f"a latent frame is {one.tokens} tokens and {format_bytes(one.frame_bytes())}"
    lines = [
        f"profile {p.profile}: {one.parameters:,} parameters a network; {frame} of keys and values a sample",
        f"compute: products in {p.compute.dtype}, checkpointing {'on' if p.compute.checkpointing else 'off'}",
        f"hardware: {machine.description}",
        "",
        f"{'stage':<12}{'networks':>10}{'trained':>10}{'batch':>7}{'steps':>7}{'TFLOP/step':>12}{'time':>10}{machine.unit + ' hours':>13}"
        f"{'out':>10}{'checkpoints':>13}",
    ]
    for row in stages:
        out, saved = (format_bytes(row["disk_gib"][name] * GIB) for name in ("out", "checkpoints"))
        lines.append(
            f"{row['stage']:<12}{format_count(row['parameters']):>10}{format_count(row['trained']):>10}{row['batch']:>7}{row['steps']:>7}"
            f"{format_number(row['tflop_per_step']):>12}{format_duration(row['hours']):>10}"
            f"{format_number(row['hours'] * machine.ranks):>13}{out:>10}{saved:>13}"
        )
    total, many = sum(row["hours"] for row in stages), count_clips(p)
    all_clips = f"; {count_things(many, 'clip')}: {format_bytes(many * clip)}" if many else f"; no video lies in {p.clips.folder} yet"
    lines += [
        f"{'together':<12}{format_duration(total):>56}{format_number(total * machine.ranks):>13}",
        f"latents of a clip: {format_bytes(clip)}{all_clips}",
        "",
        f"{unit} on a {machine.unit} by ZeRO stage, with as many samples at once as fit in {format_number(machine.memory / GIB)} GiB:",
        f"{'stage':<12}{'ZeRO':>5}{'weights':>9}{'gradients':>11}{'optimiser':>11}{'average':>9}{'keys, values':>14}{'activations':>13}"
        f"{'latents':>9}{'error bank':>12}{'at once':>11}{'peak':>8}",
    ]
    lines += [format_memory_line(row, zero, scale) for row in stages for zero in (ZERO_STAGES if machine.ranks > 1 else ZERO_STAGES[:1])]
    return "\n".join(lines)


def format_memory_line(row: dict[str, Any], zero: int, scale: float) -> str:
    """Return a stage's line of the memory table for a ZeRO stage; `scale` turns GiB into the table's unit."""
    sizes, each = row["gib"][str(zero)], row["gib_of_a_sample"]
    many = max(1, sizes["at_once"])
    parts = [sizes[name] for name in ("weights", "gradients", "optimiser", "average")]
    parts += [*(many * each[name] for name in ("keys_values", "activations", "latents")), row["gib_shared"]]
    cells = "".join(f"{format_number(scale * part):>{width}}" for part, width in zip(parts, (9, 11, 11, 9, 14, 13, 9, 12), strict=True))
    fits, peak = sizes["at_once"] or "1 too many", format_number(scale * sizes["peak"])
    return f"{row['stage'] if zero == 0 else '':<12}{zero:>5}{cells}{fits:>11}{peak:>8}"


def format_count(value: int) -> str:
    return f"{value / 1e9:.2f} B" if value >= 1e9 else f"{value / 1e6:.2f} M"


def format_bytes(value: float) -> str:
    for unit, name in ((2**40, "TiB"), (GIB, "GiB"), (MIB, "MiB")):
        if value >= unit:
            return f"{format_number(value / unit)} {name}"
    return f"{format_number(value / 2**10)} KiB"


def format_duration(hours: float) -> str:
    number, unit = (hours / 24, "days") if hours >= 48 else (hours, "h") if hours >= 1 else (hours * 60, "min")
    return f"{format_number(number)} {unit}"


def describe_hardware(gpus: int | None, memory: float | None, tflops: float | None, utilisation: float) -> Hardware:
    """Return the hardware as the options state it, and what they leave out as this machine has it."""
    count = gpus if gpus is not None else 1 if memory else count_gpus()
    if not count:
        free, reached = measure_memory(), tflops * utilisation if tflops else CPU_TFLOPS
        cpu = f"1 process on the CPU, {format_number(free / GIB)} GiB free, {format_number(reached * 1000)} GFLOP/s"
        return Hardware(1, free, reached, "CPU", cpu + ("" if tflops else " (what profile tiny reaches on one core)"))
    size = memory * GIB if memory else measure_memory() if count_gpus() else DEFAULT_MEMORY * GIB
    peak = tflops or H100_TFLOPS
    gpu = f"{count_things(count, 'GPU')} of {format_number(size / GIB)} GiB, {utilisation:.0%} of {format_number(peak)} TFLOP/s each"
    return Hardware(count, size, peak * utilisation, "GPU", gpu)


def main(argv: list[str]) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("cf plan", description=__doc__, epilog=EXAMPLES, formatter_class=form)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="default: params.yaml")
    parser.add_argument("--gpus", type=int, help="default: those of this machine; 0: one process on the CPU")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="of one GPU; default: this machine's, or 80")
    parser.add_argument("--tflops", type=float, help=f"peak of one GPU; default: {H100_TFLOPS:.0f}, an H100 in bfloat16")
    parser.add_argument("--utilisation", type=float, default=UTILISATION, help=f"share of the peak that is reached; default: {UTILISATION}")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    args = parser.parse_args(argv)
    if args.gpus is not None and args.gpus < 0:
        raise Refused(f"--gpus is {args.gpus}; use 0 for the CPU, or 1 and more")
    if not 0 < args.utilisation <= 1:
        raise Refused(f"--utilisation is {args.utilisation}; it is a share of the peak: use a value above 0 and at most 1")
    for name in ("gpu_memory", "tflops"):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise Refused(f"--{name.replace('_', '-')} is {value}; use a value above 0")
    p = load_params(args.params)
    machine = describe_hardware(args.gpus, args.gpu_memory, args.tflops, args.utilisation)
    if args.json:
        print(json.dumps({"profile": p.profile, "hardware": machine.description, "stages": list(forecast_stages(p, machine))}, indent=1))
    else:
        print(format_table(p, machine))
