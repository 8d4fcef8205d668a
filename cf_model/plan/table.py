"""The tables of `cf plan`: a row of numbers for each training stage, and the rows as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .fit import GIB, format_number, list_micro_batches
from .hardware import Hardware, estimate_hours
from .need import ZERO_STAGES, StageNeed

MIB = 2**20


def forecast_stage(stage: str, one: StageNeed, machine: Hardware, disk: Mapping[str, float], micro_batch: int | None) -> dict[str, Any]:
    """Return a stage's row, as `cf plan --json` prints it. `disk`: bytes that it writes; `micro_batch`: samples at once, if stated."""
    states: dict[str, dict[str, float]] = {}
    candidates = [micro_batch] if micro_batch else list_micro_batches(one.batch, machine.ranks)
    for zero in ZERO_STAGES:
        at_once = next((n for n in candidates if one.peak(n, zero, machine.ranks) <= machine.memory), 0)  # 0: none fits
        parts_of = {name: size / GIB for name, size in one.states(zero, machine.ranks).items()}
        peak = one.peak(max(1, at_once), zero, machine.ranks) / GIB
        states[str(zero)] = parts_of | {"at_once": at_once, "peak": peak}
    return {
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
        "disk_gib": {name: written / GIB for name, written in disk.items()},
    }


def format_times(stages: Sequence[Mapping[str, Any]], machine: Hardware) -> list[str]:
    """Return the lines of the table of operations, time and disk."""
    lines = [
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
    total = sum(row["hours"] for row in stages)
    return [*lines, f"{'together':<12}{format_duration(total):>56}{format_number(total * machine.ranks):>13}"]


def format_memory(stages: Sequence[Mapping[str, Any]], machine: Hardware) -> list[str]:
    """Return the lines of the table of memory by ZeRO stage."""
    small = max(row["gib"]["0"]["peak"] for row in stages) < 1
    scale, unit = (GIB / MIB, "MiB") if small else (1.0, "GiB")
    lines = [
        f"{unit} on a {machine.unit} by ZeRO stage, with as many samples at once as fit in {format_number(machine.memory / GIB)} GiB:",
        f"{'stage':<12}{'ZeRO':>5}{'weights':>9}{'gradients':>11}{'optimiser':>11}{'average':>9}{'keys, values':>14}{'activations':>13}"
        f"{'latents':>9}{'error bank':>12}{'at once':>11}{'peak':>8}",
    ]
    shown = ZERO_STAGES if machine.ranks > 1 else ZERO_STAGES[:1]
    return [*lines, *(format_memory_line(row, zero, scale) for row in stages for zero in shown)]


def format_memory_line(row: Mapping[str, Any], zero: int, scale: float) -> str:
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
