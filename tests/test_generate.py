"""Which noise, memory and levels a video is made with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tasks import generate
from tasks.params import load, schema
from tests.small import denoiser

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def stated() -> schema.Params:
    p = load.load_params(ROOT / "profiles/smoke.yaml")
    linear = replace(p.codec.linear, channels=4)
    return p.model_copy(update={"codec": p.codec.model_copy(update={"linear": linear})})


def video(p: schema.Params, system: str, *, seed: int = 0, number: int = 0, real: torch.Tensor | None = None) -> torch.Tensor:
    listed = {**p.generate.continuations, **p.generate.systems} if real is None else p.generate.continuations
    job = generate.VideoJob("prompts", system, listed[system], number, seed, "a prompt", None, real)
    model = denoiser(3)
    text = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    return torch.cat(list(generate.generate_latents(p, job, {listed[system].weights: model}, text, torch.zeros(5, 8))), dim=1)


def test_same_seed_same_video_other_seed_other_video(stated: schema.Params) -> None:
    first = video(stated, "stage2")
    assert first.shape == (1, 21, 4, 4, 4)
    assert torch.equal(first, video(stated, "stage2"))
    assert not torch.equal(first, video(stated, "stage2", seed=1)) and not torch.equal(first, video(stated, "stage2", number=1))


def test_a_continuation_begins_with_what_was_real(stated: schema.Params) -> None:
    real = torch.randn(1, 21, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    for system in ("stage2", "teacher_slow_fast", "teacher_none"):
        made = video(stated, system, real=real)
        assert made.shape[1] == 42 and torch.equal(made[:, :21], real)


def test_a_stage_is_run_with_the_memory_it_was_trained_with(stated: schema.Params) -> None:
    """Another memory for stage 2 changes stage 2's video and nobody else's; a stated one is an ablation of its own."""
    longer = {name: system.model_copy(update={"frames": 42}) for name, system in stated.generate.systems.items()}
    stated = stated.model_copy(update={"generate": stated.generate.model_copy(update={"systems": longer, "continuations": {}})})
    other = stated.model_copy(update={"stage2": replace(stated.stage2, memory=replace(stated.stage2.memory, positions="packed"))})
    assert torch.equal(video(stated, "stage1"), video(other, "stage1"))
    assert not torch.equal(video(stated, "stage2"), video(other, "stage2"))
    assert torch.equal(video(stated, "stage2_without_slow"), video(other, "stage2_without_slow"))
