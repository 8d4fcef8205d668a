"""The benchmarks' own parts: the usual cache gives our numbers, the audit counts what operations do."""

from __future__ import annotations

import pytest
import torch

from benchmarks.common.usual_cache import UsualStudent
from cf_model.model.context import build_plain_spec
from cf_model.model.memory import empty_memory
from cf_model.model.rollout import denoise_chunk
from tests.small import SHAPE, denoiser, normal

SIGMAS = [1.0, 0.9, 0.6]


@pytest.mark.parametrize("sink", [0, 3])
@torch.no_grad()
def test_the_usual_cache_makes_the_videos_of_our_memory_at_absolute_positions(sink: int) -> None:
    """Eight chunks of two videos, of which five come after the window of nine frames has begun to forget."""
    model, text = denoiser(), normal(2, 5, 8, seed=4)
    usual, memory = UsualStudent(model, sink=sink, window=9), empty_memory(build_plain_spec(sink, 9 - sink, "absolute"))
    for number in range(8):
        noise = [normal(2, 3, *SHAPE, seed=100 * number + step) for step in range(len(SIGMAS))]
        ours, _, memory = denoise_chunk(model, text, SHAPE, SIGMAS, 3, memory, iter(noise))
        memory = model.remember(ours, text, memory)
        theirs = usual.make_chunk(noise, SIGMAS, text, 3 * number)
        assert torch.allclose(ours, theirs, rtol=0, atol=2e-5), f"chunk {number}: {(ours - theirs).abs().max()}"
