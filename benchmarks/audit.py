"""Kernels, bytes, float64 bytes and host reads of one steady chunk of Wan 1.3B at 832 x 480, counted without computing anything.

  python -m benchmarks audit            minutes of one core; writes results/audit.json

The chunk is made by the code that makes videos, in bfloat16 with the paper's memory full, on tensors that have shapes and no numbers. So
the counts are the same on every machine, and tests/test_benchmarks.py holds the code to benchmarks/limits.json. Eager: an operation reads
its inputs and writes its outputs once. Compiled: every pass as inductor's scheduler fuses it (common/fused.py), and what is done once a
chunk eagerly. Layers are alike, so models of one and two layers tell what 30 cost.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.common.fused import count_fused
from benchmarks.common.kernels import Tally, count_kernels, is_product, list_largest
from benchmarks.common.machine import write_result
from cf_model.model import block, wan
from cf_model.model.denoiser import Compute, Denoiser
from cf_model.model.memory import Memory, MemorySpec, empty_memory
from cf_model.model.rollout import denoise_chunk
from cf_model.plan.forecast import estimate_costs
from cf_model.plan.passes import cost_rollout, plan_scoring, tally_lengths, tally_starts, trace_memory
from tasks.params.load import load_params

SHAPE, TEXT = (16, 60, 104), (512, 4096)  # a latent of 832 x 480, and a prompt of UMT5
# the code takes the operations of a GPU, as it would for the real tensors, though these say that they are on a CPU
AS_ON_A_GPU = patch.object(block, "is_on_gpu", lambda x: True)
PEERS = [  # docs/performance.md says how they were counted
    {"code": "Self-Forcing, window 21", "kernels": 10170, "gigabytes": 488.5, "float64_gigabytes": 151, "host_reads": 540},
    {"code": "LongLive, window 12, sink 3", "kernels": 10950, "gigabytes": 546.3, "float64_gigabytes": 151, "host_reads": 690},
    {"code": "LongLive with bounded positions, 21/3", "kernels": 11550, "gigabytes": 1084.7, "float64_gigabytes": 604, "host_reads": 690},
]


class Chunk:
    """A student of few layers at Wan's width on fake tensors, with a full memory, before its next chunk."""

    def __init__(self, layers: int) -> None:
        params = load_params(ROOT / "profiles/wan-1.3b.yaml")
        self.spec, self.levels = params.stage2.memory, params.flow.shift_levels(params.stage2.rollout.levels)
        self.chunk, self.mode = params.stage2.rollout.chunk, FakeTensorMode()
        with self.mode, torch.no_grad():
            sizes, compute = (
                replace(params.model, layers=layers),
                Compute("native", "bfloat16", checkpointing=False, compiled=False, graphs=False, merged=False),
            )
            built = {"channels": SHAPE[0], "text_channels": TEXT[1], "seed": 0, "compute": compute}
            self.model: Denoiser = wan.build_transformer(sizes, **built).eval().freeze()
            self.text = torch.randn(1, *TEXT)
            self.memory = self.fill()
            self.memory = self.make(self.memory)  # what is made by a video's first passes, such as the prompt's keys, is there

    def fill(self) -> Memory:
        """Return a full memory, sooner than a video would have it: every chunk is tested meanwhile."""
        quick: MemorySpec = replace(self.spec, interval=1)
        memory = empty_memory(quick)
        for _ in range((self.spec.sink + self.spec.fast) // self.chunk + self.spec.slow + 1):
            memory = self.model.remember(self.noise(), self.text, memory)
        return replace(memory, spec=self.spec)

    def noise(self) -> Tensor:
        """Return a chunk of latents."""
        return torch.randn(1, self.chunk, *SHAPE)

    def make(self, memory: Memory) -> Memory:
        """Make the next chunk, as `cf video` does, and return the memory after it."""
        noise = iter([self.noise() for _ in self.levels])
        x_0, _, memory = denoise_chunk(self.model, self.text, SHAPE, self.levels, self.chunk, memory, noise)
        return self.model.remember(x_0, self.text, memory)

    def count(self, run: Callable[[], object]) -> Tally:
        """Count what a function does."""
        with self.mode, torch.no_grad(), AS_ON_A_GPU:
            return count_kernels(run)

    def count_eager(self, chunks: int) -> Tally:
        """Count the mean of so many chunks."""

        def run() -> None:
            memory = self.memory
            for _ in range(chunks):
                memory = self.make(memory)

        tally = self.count(run)
        return tally.combine(tally, 1 / chunks, 0)

    def count_compiled(self, eager: Tally) -> Tally:
        """Count a chunk whose passes are fused and whose rest is as eager as it was, the mean chunk being `eager`."""
        x, level = self.noise_and_level()
        with self.mode, torch.no_grad():
            self.model(x, level, self.text, self.memory)  # what a chunk's first pass makes for the others is there
        with AS_ON_A_GPU:
            fused = count_fused(lambda x, level: self.model(x, level, self.text, self.memory), [x, level], self.mode)
        warm = self.count(lambda: self.model(x, level, self.text, self.memory))
        passes = len(self.levels) + 1
        for name in [name for name in fused.counts if is_product(name)]:
            del fused.counts[name]  # the scheduler does not see what attention reads of slots that were just written
        fused.counts |= {name: count for name, count in warm.counts.items() if is_product(name)}
        return eager.combine(warm, 1, -passes).combine(fused, 1, passes)

    def noise_and_level(self) -> tuple[Tensor, Tensor]:
        """Return what a denoising pass is given."""
        with self.mode:
            return self.noise(), torch.ones(1)


def extrapolate(one: Tally, two: Tally, layers: int = 30) -> Tally:
    """Return what `layers` layers cost, from models of one and of two."""
    return one.combine(two, 2 - layers, layers - 1)


def audit_eager(chunks: int = 2) -> tuple[Tally, list[tuple[Chunk, Tally]]]:
    """Count the mean of so many eager chunks of the whole model; also return the small models with what they cost."""
    parts = []
    for layers in (1, 2):
        small = Chunk(layers)
        parts.append((small, small.count_eager(chunks)))
    return extrapolate(parts[0][1], parts[1][1]), parts


def split_step(stage: str) -> dict[str, Any]:
    """Split the operations of a training step of Wan 1.3B, a sample's mean over the stage, by what they are for (cf_model/plan)."""
    params = load_params(ROOT / "profiles/wan-1.3b.yaml")
    spec, costs = getattr(params, stage), estimate_costs(params)
    roll, view = spec.rollout, spec.want_layout(params.teacher.view).view
    lengths = tally_lengths(spec.horizon, roll.chunk, spec.steps)
    traced = list(islice(trace_memory(spec.memory, roll.chunk), max(lengths) // roll.chunk))
    prompts, learns = 1 if spec.teacher.guidance == 1 else 2, spec.student_updates / spec.steps
    made = {"each": 1.0, "shared": 1 / spec.critic_updates, "own": 1 + learns}[spec.rollouts]
    parts = {"rollout": 0.0, "critic's update": 0.0, "scores for the student": 0.0, "replay with gradient": 0.0}
    for frames, often in lengths.items():
        for start, share in tally_starts(frames, roll).items():
            weight, costed = often * share, cost_rollout(spec, costs, traced, start)
            scoring = plan_scoring(costs, view, roll.window, len(view.context_frames(start)))
            parts["rollout"] += weight * made * costed.rollout
            parts["critic's update"] += weight * scoring.trained_operations
            scores = (prompts + 1) * scoring.target_operations + prompts * scoring.context_operations
            parts["scores for the student"] += weight * learns * scores
            parts["replay with gradient"] += weight * learns * costed.replay
    whole = sum(parts.values())
    return {"stage": stage, "teraflop": round(whole / 1e12), "shares": {name: round(part / whole, 3) for name, part in parts.items()}}


def describe(tally: Tally) -> dict[str, Any]:
    """Describe a tally in gigabytes, with what is left beside products and attention, largest first."""
    rows = [
        {"operation": name, "kernels": round(count.kernels), "gigabytes": round(count.bytes / 1e9, 2)}
        for name, count in list_largest(tally, below=5e6)
        if not is_product(name)
    ]
    return {
        "kernels": round(tally.total("kernels")),
        "gigabytes": round(tally.total("bytes") / 1e9, 1),
        "products_and_attention_gigabytes": round(tally.total("bytes", is_product) / 1e9, 1),
        "float64_gigabytes": round(tally.total("wide_bytes") / 1e9, 3),
        "host_reads": round(tally.host_reads),
        "uploads": round(tally.uploads),
        "the_rest": rows,
    }


def main() -> None:
    eager, parts = audit_eager(chunks=8)
    print("eager", describe(eager), flush=True)
    compiled = extrapolate(*(small.count_compiled(tally) for small, tally in parts))
    print("compiled", describe(compiled), flush=True)
    model = "Wan 1.3B, 832 x 480, bfloat16, the paper's memory of 21 latents, four passes and the clean one"
    result = {"model": model, "torch": torch.__version__, "eager": describe(eager), "compiled": describe(compiled), "peers": PEERS}
    write_result("audit", result | {"training_steps": [split_step("stage1"), split_step("stage2")]})


if __name__ == "__main__":
    main()
