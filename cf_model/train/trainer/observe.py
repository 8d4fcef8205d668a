"""Measure a running training beside its losses: the memory's promotions (eq. 7), seconds of a step, peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cf_model.model.memory import ChunkComparison, MemorySpec

from .ranks import gather_rows

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)  # of the similarities
# values beside the progress bar, the most important first
PROGRESS_NAMES = ("loss", "critic_loss", "score_distance", "gradient", "student_gradient", "frames")
PROGRESS_COUNT = 4  # that fit into a line


def read_values(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Read a step's values from the device, all at once, because every read waits until the GPU has done what was asked of it."""
    there = {name: value.double() for name, value in values.items() if isinstance(value, Tensor) and value.device.type != "cpu"}
    read = dict(zip(there, torch.stack(list(there.values())).tolist(), strict=True)) if there else {}
    return {name: read[name] if name in read else float(value) for name, value in values.items()}


def select_progress_values(latest: Mapping[str, float]) -> dict[str, float]:
    """Choose the values that go beside the progress bar from the newest value of each name."""
    names = [name for name in PROGRESS_NAMES if name in latest]
    return {name: latest[name] for name in names[:PROGRESS_COUNT]}


def join_comparisons(groups: Sequence[Sequence[ChunkComparison]]) -> list[ChunkComparison]:
    """Join what the groups of a step and all ranks compared, chunk by chunk, to one batch. Every rank must call.

    For the log alone: each video has decided on its own, and no decision waits for this.
    """
    chunks = list(zip(*groups, strict=True))
    if not chunks:
        return []
    # One collective for all chunks: similarities [B, layers] and, where videos decide for themselves, decisions [B, G] side by side.
    parts = [torch.cat([one.similarity for one in of_groups]) for of_groups in chunks]
    parts += [torch.cat([one.decisions for one in of_groups]).to(parts[0]) for of_groups in chunks if _is_own(of_groups[0])]
    joined = iter(gather_rows(torch.cat(parts, dim=1)).split([part.shape[1] for part in parts], dim=1))
    similarities = [next(joined) for _ in chunks]
    decisions = [next(joined).bool() if _is_own(of_groups[0]) else of_groups[0].decisions for of_groups in chunks]
    return [ChunkComparison(*both) for both in zip(similarities, decisions, strict=True)]


def _is_own(chunk: ChunkComparison) -> bool:
    """Tell whether each video has decided for itself, so that the decision is a tensor."""
    return isinstance(chunk.decisions, Tensor)


def measure_promotion(spec: MemorySpec, compared: Sequence[ChunkComparison]) -> dict[str, Tensor]:
    """Measure how similar neighbouring chunks are and how many of the tested chunks are promoted, as a guide to choosing tau (eq. 7).

    All values are over the videos of the batch. `similarity/qNN` are quantiles of the numbers that eq. 7 compares with tau: a chunk's
    mean over layers, or with scope=layer each layer's own. Rules that do not look at similarity have none. `promotion/layer_NN` is the
    share of chunks that this layer promotes. With scope=global layers do not decide; the value is what the layer would have decided
    alone. Returns {} where nothing was compared.
    """
    if not compared:
        return {}
    similarity = torch.stack([chunk.similarity for chunk in compared]).double()  # [chunks, B, layers]
    values = {"similarity": similarity.mean()}
    values |= {f"similarity/layer_{n:02}": value for n, value in enumerate(similarity.mean(dim=(0, 1)).unbind())}
    decided = [(n, chunk.decisions) for n, chunk in enumerate(compared) if chunk.decisions is not None]  # every second, with interval 2
    if not decided:
        return values
    tested = similarity[[n for n, _ in decided]]
    # A rule that does not look at the video decides alike for all.
    same = tested.new_ones(tested.shape[1], 1)
    promoted = torch.stack([news.double() if isinstance(news, Tensor) else same * news for _, news in decided])  # [tested, B, G]
    values["promotion"] = promoted.mean()
    if spec.promote != "similarity":
        return values
    # What each layer decides, or with scope=global would decide: its own similarity against tau.
    by_layer = promoted if spec.scope == "layer" else (tested < spec.tau).double()
    values |= {f"promotion/layer_{n:02}": value for n, value in enumerate(by_layer.mean(dim=(0, 1)).unbind())}
    # What tau is compared with.
    against_tau = (tested if spec.scope == "layer" else tested.mean(dim=2)).flatten()
    quantiles = against_tau.quantile(torch.tensor(QUANTILES, dtype=torch.float64, device=tested.device))
    return values | {f"similarity/q{100 * q:02.0f}": value for q, value in zip(QUANTILES, quantiles.unbind(), strict=True)}


class StepTimer:
    """Seconds of a step by the part of the step they were spent on. A lap gives its name to the time since the lap before.

    On a GPU a lap is an event in the GPU's queue, read when the step is over, because reading the clock would wait for the GPU.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.gpu = device is not None and device.type == "cuda"
        self.laps: list[tuple[str, Any]] = []  # name, and seconds or a CUDA event; empty: not started, nothing is measured

    def start(self) -> None:
        """Begin a step."""
        self.laps = [("", self._read_now())]

    def lap(self, name: str) -> None:
        """End the part `name` of the step; does nothing unless `start` was called."""
        if self.laps:
            self.laps.append((name, self._read_now()))

    def read_seconds(self) -> dict[str, float]:
        """Return the seconds since `start` by part, and their sum as `step`; what has no name is `rest`."""
        self.lap("rest")
        # Wait for the GPU once a step, when its last event is recorded.
        if self.gpu:
            torch.cuda.synchronize()
        spent: dict[str, float] = {}
        for (_, before), (name, now) in pairwise(self.laps):
            seconds = now - before if isinstance(now, float) else before.elapsed_time(now) / 1000
            spent[name] = spent.get(name, 0.0) + seconds
        return {"step": sum(spent.values())} | spent

    def _read_now(self) -> Any:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def measure_peak_memory() -> dict[str, float]:
    """Return the process's highest memory so far and the GPU's highest since the call before, in MiB."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    peaks = {"peak_mib": round(resident, 1)}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peaks["cuda_peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
        torch.cuda.reset_peak_memory_stats()
    return peaks
