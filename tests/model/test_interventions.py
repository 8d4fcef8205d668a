"""Pairs of worlds that differ in one fact, and what a student that remembers the fact, or cannot, makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cf_model.data import interventions, worlds
from cf_model.evaluate import scores
from cf_model.model.recall import measure_following
from tests.small import SHAPE, denoiser, normal, spec

ASKED = {"sink": 9, "start": 237, "stop": 285}


def test_the_two_worlds_of_a_pair_look_alike_until_long_before_the_question() -> None:
    """They differ in pixels only where the hill is in view: not in the sink, not for the lag before the question, and then again."""
    pairs = list(interventions.find_pairs(4.0, 3, worlds.PLAIN, seed=500_000, fps=16, **ASKED))
    assert len({pair.first.seed for pair in pairs}) == 3 and all(4 <= pair.away < 8 for pair in pairs)
    first, second = interventions.render_pairs(pairs, ASKED["stop"], height=32, width=32, fps=16).astype(int)
    for pair, a, b in zip(pairs, first, second, strict=True):
        assert sum(one != other for one, other in zip(pair.first.landmarks, pair.second.landmarks, strict=True)) == 1
        differs = np.flatnonzero(np.abs(a - b).max(axis=(1, 2, 3)) > 2)
        before = differs[differs < ASKED["start"]]
        assert before[0] >= ASKED["sink"] and ASKED["start"] - before[-1] >= 4 * 16 - 1
        assert len(differs[differs >= ASKED["start"]]) >= 0.2 * (ASKED["stop"] - ASKED["start"])


def test_a_lag_of_zero_is_still_in_view_and_an_impossible_one_has_no_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(pair.away < 1 for pair in interventions.find_pairs(0.0, 4, worlds.PLAIN, seed=0, fps=16, **ASKED))
    monkeypatch.setattr(interventions, "MOST_TRIED", 50)
    assert list(interventions.find_pairs(60.0, 4, worlds.PLAIN, seed=0, fps=16, **ASKED)) == []


def test_a_fact_outside_the_memory_moves_nothing_and_one_inside_does() -> None:
    """Both worlds differ in latents 6 to 11 alone: a fast part of three frames lets go of them, a slow part keeps them."""
    text, real = normal(2, 5, 8), normal(2, 24, *SHAPE, seed=1)
    other = real.clone()
    other[:, 6:12] += normal(2, 6, *SHAPE, seed=2)
    other[:, 21:] += normal(2, 3, *SHAPE, seed=3)
    asked = {"start": 21, "chunk": 3, "sigmas": [1.0, 0.5], "seed": 0}
    pairs = torch.stack([real, other])
    short = measure_following(denoiser(), pairs, text, spec(slow=0, fast=3), **asked)
    long = measure_following(denoiser(), pairs, text, spec(slow=9, fast=3, promote="uniform"), **asked)
    assert short.shape == (2, 2) and (short[0] + short[1]).abs().max() < 1e-6, "the same video is made twice"
    assert ((long[0] + long[1]).abs() > 1e-5).all(), "the videos differ"


def test_the_effect_is_what_is_above_chance_and_the_context_the_longest_lag_that_has_one() -> None:
    def row(lag: float, world: int, first: float, second: float) -> dict[str, object]:
        return {"system": "stage2", "lag": lag, "world": world, "away": lag, "follows": [first, second]}

    rows = [row(0.0, k, 0.4, 0.2) for k in range(8)] + [row(4.0, k, 0.3, 0.1 if k < 6 else -0.3) for k in range(8)]
    rows += [row(8.0, k, 0.2, -0.2) for k in range(8)]
    cells = scores.score_interventions(rows)
    found = scores.summarise_systems(cells, resamples=500, seed=0)["recall"]["stage2"]
    assert found == {"context_effect_0s": 0.5, "context_effect_4s": 0.375, "context_effect_8s": 0.0, "effective_context": 4.0}
    nothing = scores.summarise_systems(cells[16:], resamples=500, seed=0)["recall"]["stage2"]
    assert nothing == {"context_effect_8s": 0.0}, "no lag has an effect, so there is no effective context"
