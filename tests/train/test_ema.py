"""The average of the student's weights: from which update on, and how long its memory is."""

from __future__ import annotations

import pytest
import torch

from cf_model.train.trainer.ema import EMA


def average_of_steps(updates: int, decay: float, start: int, *, ramp: bool) -> tuple[float, float]:
    """Average a weight that is n after the n-th update; return the average and its mean age in updates."""
    model = torch.nn.Linear(1, 1, bias=False).double()
    model.weight.data.zero_()
    average = EMA(model, decay, start, ramp=ramp)
    for number in range(1, updates + 1):
        model.weight.data.fill_(float(number))
        average.update()
    mean = float(average.model.weight)
    return mean, updates - mean


def test_a_plain_average_is_the_stated_one_from_the_stated_update_on():
    """The sources: 0.99 from a stated update. Here by the sum itself."""
    mean, _ = average_of_steps(120, 0.99, 40, ramp=False)
    expected = 40.0  # the raw weights until then
    for number in range(41, 121):
        expected = 0.99 * expected + 0.01 * number
    assert mean == pytest.approx(expected, rel=1e-9)


def test_before_its_start_the_average_is_the_raw_weights():
    assert average_of_steps(40, 0.99, 40, ramp=False) == (40.0, 0.0)


def test_a_rising_average_is_shorter_than_it_says():
    """With 120 updates its decay never exceeds 0.93, and what it averages is a dozen updates old; a plain one is 62 updates old."""
    assert 10 < average_of_steps(120, 0.99, 0, ramp=True)[1] < 14
    assert average_of_steps(120, 0.99, 0, ramp=False)[1] > 50
