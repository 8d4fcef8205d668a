"""The one-step probe of real clips: what it measures is the model's own prediction, with and without the slow part."""

from __future__ import annotations

import torch

from cf_model.model.flow import add_noise
from cf_model.model.recall import measure_one_step_errors
from tests.small import SHAPE, denoiser, normal, rng, spec


def test_an_error_is_that_of_one_prediction_from_the_memory_of_the_real_clip() -> None:
    student, real, text = denoiser(), normal(2, 24, *SHAPE), normal(2, 5, 8)
    with_slow = spec(sink=3, slow=3, fast=3, promote="uniform")
    found = measure_one_step_errors(student, real, text, with_slow, chunk=3, start=6, sigmas=[0.9], rng=rng())
    assert {key: tuple(errors.shape) for key, errors in found.items()} == {(0.9, True): (2, 18, 4, 4), (0.9, False): (2, 18, 4, 4)}
    # Until something is promoted the two memories hold the same frames; then they do not.
    same = torch.isclose(found[0.9, True], found[0.9, False], atol=1e-6).flatten(2).all(-1).all(0)
    assert same[0] and not same[-1]
    noise = rng()
    draws = [torch.randn(2, 3, *SHAPE, generator=noise) for _ in range(6)]
    level, last = torch.full((2,), 0.9), real[:, 21:]
    memory = student.remember_clip(real[:, :21], text, with_slow, chunk=3)
    with torch.no_grad():
        x_0 = student(add_noise(last, draws[-1], level), level, text, memory)
    assert torch.allclose(found[0.9, True][:, -3:], (x_0 - last).square().mean(dim=2), atol=1e-5)
