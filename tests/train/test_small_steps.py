"""The profile small: it fits one GPU by the plan's arithmetic, and every stage takes two steps with its settings on a CPU.

The model is as wide as the profile says and has two of its layers, and a batch has one clip, because a whole step takes a CPU minutes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cf_model.model import wan
from cf_model.model.denoiser import Denoiser
from cf_model.model.rollout import HorizonSpec
from cf_model.plan import forecast
from cf_model.plan.fit import GIB
from cf_model.plan.hardware import H100_TFLOPS, Hardware
from cf_model.train.base import BaseTrainer
from cf_model.train.causal_init import CausalInitTrainer
from cf_model.train.student import DistillationTrainer
from cf_model.train.teacher import TeacherTrainer
from cf_model.train.trainer.observe import read_values
from tasks.params.load import load_params
from tasks.params.schema import Params
from tests.small import normal

ROOT = Path(__file__).parents[2]
LAYERS, STEPS = 2, 2


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(ROOT / "profiles/small.yaml")


def test_it_is_of_the_size_that_its_head_says(params: Params) -> None:
    costs = forecast.estimate_costs(params)
    assert round(costs.parameters / 1e6) == 44 and params.video.height == params.video.width == 64
    machine = Hardware(ranks=1, memory=80 * GIB, tflops=H100_TFLOPS * 0.35, unit="GPU", description="")
    rows = forecast.forecast_stages(params, machine)
    assert [row["stage"] for row in rows] == ["base", "teacher", "causal_init", "stage1", "stage2"]
    assert all(row["gib"]["0"]["at_once"] >= 1 and row["gib"]["0"]["peak"] < 80 for row in rows)


class Clips:
    """Clips of random latents, long enough for every stage."""

    def __init__(self, p: Params) -> None:
        self.shape = (p.codec.linear.channels, p.video.height // 8, p.video.width // 8)
        self.empty_text = torch.zeros(p.text.tokens, p.text.channels)

    def rows(self, split: str, at_least: int = 1) -> list[int]:
        return [0, 1]

    def frames(self, row: int) -> int:
        return 121

    def window(self, rows: list[int], starts: list[int], length: int) -> Tensor:
        return normal(len(rows), length, *self.shape)

    def text(self, rows: list[int]) -> Tensor:
        return normal(len(rows), *self.empty_text.shape)


def build_trainer(stage: str, p: Params) -> Any:
    clips = Clips(p)

    def model(seed: int = 0) -> Denoiser:
        sizes = replace(p.model, layers=LAYERS)
        made = wan.build_transformer(sizes, channels=clips.shape[0], text_channels=p.text.channels, seed=seed, compute=p.compute)
        torch.nn.init.normal_(made.transformer.proj_out.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
        return made  # its head is not 0, so that gradients reach every weight from the first step on

    common: dict[str, Any] = {"flow": p.flow, "seed": 0}
    if stage == "base":
        return BaseTrainer(replace(p.base, batch=1), model=model(), latents=clips, **common)
    if stage == "teacher":
        return TeacherTrainer(replace(p.teacher, batch=1), model=model(), latents=clips, **common)
    if stage == "causal_init":
        return CausalInitTrainer(replace(p.causal_init, batch=1), model=model(), latents=clips, **common)
    spec = p.stage1 if stage == "stage1" else p.stage2
    longest = spec.horizon.shortest
    few = {"steps": STEPS, "critic_updates": 1, "critic_warmup": 0, "horizon": HorizonSpec(longest, longest, 0, "const")}
    return DistillationTrainer(
        replace(spec, batch=1, **few),
        student=model(1),
        teacher=model(2),
        critic=model(2),
        view=spec.want_layout(p.teacher.view).view,
        prompts=normal(4, *clips.empty_text.shape),
        null=clips.empty_text,
        shape=clips.shape,
        clips=clips,
        **common,
    )


@pytest.mark.parametrize("stage", ["base", "teacher", "causal_init", "stage1", "stage2"])
def test_every_stage_takes_steps(stage: str, params: Params) -> None:
    trainer = build_trainer(stage, params)
    network = trainer.student if stage.startswith("stage") else trainer.model
    before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    for number in range(STEPS):
        values = read_values(trainer.step(number))
        assert all(torch.isfinite(torch.tensor(value)) for value in values.values()), values
    moved = [name for name, weight in network.named_parameters() if not torch.equal(weight, before[name])]
    assert len(moved) > len(before) / 2
