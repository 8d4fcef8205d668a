"""Whole steps of tiny's stages against what `cf plan` expects of them: bytes held at most, and operations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from cf_model.model.rollout import HorizonSpec, rollout
from cf_model.plan import forecast, need
from cf_model.plan.cost import ModelCosts
from cf_model.train.base import BaseTrainer
from cf_model.train.student import DistillationTrainer
from cf_model.train.teacher import TeacherTrainer
from tasks.params import load, schema
from tests.allocations import Allocations
from tests.operations import OperationCounter
from tests.small import normal
from tests.train.test_cost import model

ROOT = Path(__file__).parents[2]


class Clips:
    """Clips that are nothing but numbers."""

    shape, empty_text = (12, 4, 4), torch.zeros(16, 64)

    def rows(self, split: str, at_least: int = 1) -> list[int]:
        return [0]

    def frames(self, row: int) -> int:
        return 121

    def window(self, rows: list[int], starts: list[int], length: int) -> torch.Tensor:
        return normal(len(rows), length, *self.shape)

    def text(self, rows: list[int]) -> torch.Tensor:
        return self.empty_text.expand(len(rows), -1, -1)


def job_of_tiny(stage: str, p: schema.Params, costs: ModelCosts) -> tuple[Any, need.StageNeed]:
    """A stage of tiny whose steps are all alike: of the longest past, or of one rollout's length."""
    models = [model(costs).train() for _ in range(3 if stage == "stage2" else 1)]
    alike: Any = {"latents": Clips(), "flow": p.flow, "seed": 0}
    if stage == "base":
        return BaseTrainer(p.base, model=models[0], **alike), need.estimate_base(p.base, costs)
    if stage == "teacher":
        adam = replace(p.teacher.optimizer, muon_lr=0.0)  # Muon's own products are no pass of the model
        spec = replace(p.teacher, shortest=p.teacher.longest, no_context=0.0, fast_only=0.0, optimizer=adam)
        wanted = need.estimate_teacher(spec, costs)
        return TeacherTrainer(spec, model=models[0], **alike), replace(wanted, shared=0)  # the bank is there before the step
    horizon = HorizonSpec(27, 27, 0, "const")
    own = replace(p.stage2, horizon=horizon, critic_updates=1, rollout=replace(p.stage2.rollout, levels=(1.0,)))
    text = {"prompts": normal(8, 16, 64), "null": torch.zeros(16, 64)}
    named = {"student": models[0], "teacher": models[1], "critic": models[2], "view": p.teacher.view, "flow": p.flow}
    return DistillationTrainer(own, **named, **text, shape=(12, 4, 4), seed=0), need.estimate_student(own, costs, p.teacher.view)  # type: ignore[arg-type]


def tiny(context_pass: str, checkpointing: bool = False) -> tuple[schema.Params, ModelCosts]:
    """Tiny with a context of a fixed layout and rollouts of the student's own, whose steps are all alike."""
    p = load.load_params(ROOT / "profiles/tiny.yaml")
    view = replace(p.teacher.view, context="sparse", context_pass=context_pass)  # type: ignore[arg-type]
    shown, begun = replace(p.stage2.teacher, context="sparse"), replace(p.stage2.rollout, begin="own")
    changed = {"teacher": replace(p.teacher, view=view), "stage2": replace(p.stage2, teacher=shown, rollout=begun, critic_warmup=0)}
    p = p.model_copy(update=changed | {"compute": replace(p.compute, checkpointing=checkpointing)})
    return p, forecast.estimate_costs(p)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("stage", "context"), [("base", "joint"), ("stage2", "joint"), ("stage2", "own"), ("teacher", "joint"), ("teacher", "own")]
)
def test_a_step_of_tiny_holds_what_is_planned(stage: str, context: str, checkpointing: bool) -> None:
    job, wanted = job_of_tiny(stage, *tiny(context, checkpointing))
    job.step(0)  # from the second on, the optimisers have their state
    with Allocations() as held:
        job.step(1)
    # the student's gradients, which the plan counts apart, are there while the critic's loss is made
    gradients = wanted.states()["gradients"] / 2 if stage == "stage2" else 0
    assert held.peak == pytest.approx(wanted.batch * wanted.sample_bytes() + gradients, rel=0.15)


@pytest.mark.parametrize(("slow", "tau", "renoise"), [(12, 1.0, "none"), (3, 1.0, "none"), (3, 1.0, "own")])
def test_a_rollout_of_tiny_holds_what_is_planned(slow: int, tau: float, renoise: str) -> None:
    """Keys and values with the slow part's spare candidates and compacted copies, and the view that the passes share.

    With a slow part of 3 the list of candidates is compacted while the window's chunks wait for their replay.
    """
    p, costs = tiny("joint")
    memory, horizon = replace(p.stage2.memory, slow=slow, tau=tau), HorizonSpec(60, 60, 0, "const")
    plan = replace(p.stage2.rollout, levels=(1.0, 0.5), exit="last", renoise=renoise)  # type: ignore[arg-type]
    wanted = need.estimate_student(replace(p.stage2, memory=memory, horizon=horizon, rollout=plan), costs, p.teacher.view)
    student, text, noise = model(costs), normal(4, 16, 64), torch.Generator().manual_seed(0)
    with Allocations() as held:
        made = rollout(student, text, 60, (12, 4, 4), spec=plan, memory=memory, flow=p.flow, rng=noise)
    assert made.memory.count_slow() == min(slow, 9), "every tested chunk was news"
    assert held.now == pytest.approx(4 * (wanted.memory + wanted.latents), rel=0.1), "what waits for the replay"
    seen = memory.sink + min(slow, 8) + memory.fast - 3
    stores = 2 if renoise == "own" else 1
    view = stores * (2 * memory.size + memory.slow) * costs.frame_bytes() // 2 + costs.passing_bytes(3, seen)
    assert held.peak == pytest.approx(4 * (wanted.memory + wanted.latents + view), rel=0.1)


def test_a_step_of_short_windows_is_as_large_as_its_rollout() -> None:
    """Where scores and replay are small beside the memory, the peak is the rollout's."""
    p, costs = tiny("joint", checkpointing=True)
    memory = replace(p.stage2.memory, sink=30, slow=60, interval=1)
    short = replace(p.stage2.rollout, window=6, full_first=0, skip_first=0)
    spec = replace(p.stage2, memory=memory, rollout=short, horizon=HorizonSpec(240, 240, 0, "const"))
    wanted = need.estimate_student(replace(spec, teacher=replace(spec.teacher, context="none")), costs, p.teacher.view)
    # a slot for each place of the memory, 96, and the raw keys of the slow part's 60
    assert wanted.activations == (96 + 30) * costs.frame_bytes() + costs.passing_bytes(3, 93)


@pytest.mark.parametrize("context", ["joint", "own"])
@pytest.mark.parametrize("stage", ["teacher", "stage2"])
def test_a_step_of_tiny_takes_the_operations_that_are_planned(stage: str, context: str) -> None:
    """But for backward passes that end before the latents, and with an own context at its last block's keys and values."""
    job, wanted = job_of_tiny(stage, *tiny(context))
    with sdpa_kernel(SDPBackend.MATH), OperationCounter() as count:
        job.step(0)
    assert count.get_total_flops() == pytest.approx(wanted.batch * wanted.operations, rel=0.1)


def test_an_own_context_costs_less_and_is_read_once_for_both_updates() -> None:
    p = load.load_params(ROOT / "profiles/wan-1.3b.yaml")
    wan_costs = forecast.estimate_costs(p)
    own = replace(p.teacher.view, context_sigma="zero", context_pass="own")
    shown = replace(p.stage2.teacher, context="sparse")
    at_105 = replace(p.stage2, horizon=HorizonSpec(105, 105, 0, "const"), critic_updates=1, teacher=shown)
    made = {name: need.estimate_student(at_105, wan_costs, view).operations for name, view in (("joint", p.teacher.view), ("own", own))}
    joint, look, read = (*(wan_costs.forward(*one).repeated for one in ((42,), (21, 21))), wan_costs.forward(21).remembered)
    context = wan_costs.forward(21).trained(True, ends_early=True)
    again = wan_costs.forward(42).trained(True) - context - wan_costs.forward(21, 21).trained(True)
    assert made["joint"] - made["own"] == pytest.approx(again + 3 * joint - 3 * look - 2 * read, rel=1e-6)
