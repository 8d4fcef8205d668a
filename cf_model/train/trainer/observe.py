"""What is seen of a training while it runs, beside its losses: the memory's decisions, seconds, peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cf_model.model.memory import Compared, MemorySpec
    from cf_model.model.rollout import Rollout

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# what a line of progress has room for, the most telling first
SHOWN = ("loss", "critic_loss", "score_distance", "gradient", "student_gradient", "frames")
MOST = 4  # of them


def shown(latest: Mapping[str, float]) -> dict[str, float]:
    """Of the newest value of everything that a step ever told, what goes beside the progress bar."""
    return {name: latest[name] for name in [name for name in SHOWN if name in latest][:MOST]}


def remembered(spec: MemorySpec, compared: Sequence[Compared]) -> dict[str, float]:
    """How alike neighbouring chunks are, and how many of the tested ones were kept: what tau is judged by (eq. 7).

    The quantiles are of what was compared with tau: the mean of a chunk's layers, or with scope layer each of them. So where tau
    lies among them says what is kept. A layer's promotion is its own decision; with scope global it has none, and
    it is what the layer would have decided alone.
    """
    if not compared:
        return {}
    layers = torch.tensor([chunk.similarity for chunk in compared], dtype=torch.float64)
    values = {"similarity": float(layers.mean())}
    values |= {f"similarity/layer_{n:02}": value for n, value in enumerate(layers.mean(dim=0).tolist())}
    at = [n for n, chunk in enumerate(compared) if chunk.kept]
    if not at:
        return values
    tested = layers[at]
    kept = torch.tensor([compared[n].kept for n in at], dtype=torch.float64)
    values["promotion"] = float(kept.mean())
    if spec.promote == "similarity":
        alone = kept if spec.scope == "layer" else (tested < spec.tau).double()
        values |= {f"promotion/layer_{n:02}": value for n, value in enumerate(alone.mean(dim=0).tolist())}
    against = tested.flatten() if spec.scope == "layer" else tested.mean(dim=1)
    quantiles = against.quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
    return values | {f"similarity/q{100 * q:02.0f}": value for q, value in zip(QUANTILES, quantiles, strict=True)}


def student_loss(made: Rollout, gradient: Tensor) -> float:
    """Its value, 0.5 mse(x, (x - gradient).detach()) over the frames that carry gradient (distill.replay)."""
    chunk = made.targets[0].x_t.shape[1]
    firsts = [target.first - made.window.start for target in made.targets if target.grad]
    parts = [gradient[:, first : first + chunk].square().mean() for first in firsts]
    return 0.5 * float(torch.stack(parts).mean())


class Clock:
    """Seconds of a step by what they were spent on. A lap gives its name to the time since the lap before.

    On a GPU a lap is an event in its stream, read when the step is over, so that nobody waits for the sake of measuring.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.gpu = device is not None and device.type == "cuda"
        self.laps: list[tuple[str, Any]] = []  # seconds or events; none: nobody asks

    def start(self) -> None:
        self.laps = [("", self._now())]

    def lap(self, name: str) -> None:
        if self.laps:
            self.laps.append((name, self._now()))

    def taken(self) -> dict[str, float]:
        """Since `start`, by name, and all of it as `step`."""
        self.lap("rest")
        if self.gpu:
            torch.cuda.synchronize()
        spent: dict[str, float] = {}
        for (_, before), (name, now) in pairwise(self.laps):
            seconds = now - before if isinstance(now, float) else before.elapsed_time(now) / 1000
            spent[name] = spent.get(name, 0.0) + seconds
        return {"step": sum(spent.values())} | spent

    def _now(self) -> Any:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def peak_memory() -> dict[str, float]:
    """The process's highest so far, and the GPU's since this was last asked."""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    peaks = {"peak_mib": round(held, 1)}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peaks["cuda_peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
        torch.cuda.reset_peak_memory_stats()
    return peaks
