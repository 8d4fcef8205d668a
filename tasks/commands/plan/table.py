"""`cf plan`: what each training stage needs in memory, operations, hours and disk, before anything is started.

All of it is arithmetic on params.yaml (cf_model/plan/cost.py, need.py); nothing is loaded and no GPU is needed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from cf_model.plan.need import ZERO_STAGES
from tasks.params import load
from tasks.params.schema import Params
from tasks.params.yaml_file import Refused

from . import forecast
from .forecast import GIB, MIB, Hardware, forecast_stages, format_number

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
ZeRO          shares among the GPUs: 1 the optimiser, 2 the gradients too, 3 the weights too; average and teacher stay whole
keys, values  of the remembered frames, and activations: of the samples that a GPU computes at once
at once       engine.micro_batch, or the largest part of a GPU's share of the batch that fits; `1 too many`: it does not fit
TFLOP         matrix products of the whole batch, a multiply-add as two, a backward pass as two forward passes
checkpoints   the newest two, and the one being written

Not counted: codec, text encoder, data loading, communication, memory that an allocator can't use again, and the generation and
evaluation of videos. Keep a tenth of the memory free."""


def format_table(p: Params, machine: Hardware) -> str:
    """Return the two tables of `cf plan`: time and disk of each stage, and memory by ZeRO stage."""
    stages, one = list(forecast_stages(p, machine)), forecast.estimate_costs(p)
    small = max(row["gib"]["0"]["peak"] for row in stages) < 1
    scale, unit = (GIB / MIB, "MiB") if small else (1.0, "GiB")
    clip, frame = forecast.estimate_clip_bytes(p), f"a latent frame is {one.tokens} tokens and {format_bytes(one.frame_bytes())}"
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
    total, many = sum(row["hours"] for row in stages), forecast.count_clips(p)
    all_clips = f"; {many} clips: {format_bytes(many * clip)}" if many else f"; no video lies in {p.clips.folder} yet"
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
    fits = str(sizes["at_once"]) if sizes["at_once"] else "1 too many"
    grows = [format_number(scale * many * each[name]) for name in ("keys_values", "activations", "latents")]
    fixed = [format_number(scale * sizes[name]) for name in ("weights", "gradients", "optimiser", "average")]
    shared, peak = format_number(scale * row["gib_shared"]), format_number(scale * sizes["peak"])
    return (
        f"{row['stage'] if zero == 0 else '':<12}{zero:>5}{fixed[0]:>9}{fixed[1]:>11}{fixed[2]:>11}{fixed[3]:>9}"
        f"{grows[0]:>14}{grows[1]:>13}{grows[2]:>9}{shared:>12}{fits:>11}{peak:>8}"
    )


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
    count = gpus if gpus is not None else 1 if memory else forecast.count_gpus()
    if not count:
        free, reached = forecast.measure_memory(), tflops * utilisation if tflops else CPU_TFLOPS
        cpu = f"1 process on the CPU, {format_number(free / GIB)} GiB free, {format_number(reached * 1000)} GFLOP/s"
        return Hardware(1, free, reached, "CPU", cpu + ("" if tflops else " (what profile tiny reaches on one core)"))
    size = memory * GIB if memory else forecast.measure_memory() if forecast.count_gpus() else DEFAULT_MEMORY * GIB
    peak = tflops or H100_TFLOPS
    gpu = f"{count} GPU{'s' * (count > 1)} of {format_number(size / GIB)} GiB, {utilisation:.0%} of {format_number(peak)} TFLOP/s each"
    return Hardware(count, size, peak * utilisation, "GPU", gpu)


def build_parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("cf plan", description=__doc__, epilog=EXAMPLES, formatter_class=form)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="default: params.yaml")
    parser.add_argument("--gpus", type=int, help="default: those of this machine; 0: one process on the CPU")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="of one GPU; default: this machine's, or 80")
    parser.add_argument("--tflops", type=float, help=f"peak of one GPU; default: {H100_TFLOPS:.0f}, an H100 in bfloat16")
    parser.add_argument("--utilisation", type=float, default=UTILISATION, help=f"share of the peak that is reached; default: {UTILISATION}")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    return parser


def main(argv: list[str]) -> None:
    args = build_parser().parse_args(argv)
    if args.gpus is not None and args.gpus < 0:
        raise Refused(f"--gpus is {args.gpus}; use 0 for the CPU, or 1 and more")
    if not 0 < args.utilisation <= 1:
        raise Refused(f"--utilisation is {args.utilisation}; it is a share of the peak: use a value above 0 and at most 1")
    for name in ("gpu_memory", "tflops"):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise Refused(f"--{name.replace('_', '-')} is {value}; use a value above 0")
    p = load.load_params(args.params)
    machine = describe_hardware(args.gpus, args.gpu_memory, args.tflops, args.utilisation)
    if args.json:
        print(json.dumps({"profile": p.profile, "hardware": machine.description, "stages": list(forecast_stages(p, machine))}, indent=1))
    else:
        print(format_table(p, machine))
