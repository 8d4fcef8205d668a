"""Intervals and p values against cases that can be worked out by hand, and identities."""

from __future__ import annotations

import numpy as np
import pytest

from cf_model.evaluate.statistics import bootstrap, bootstrap_ratio, measure_effect, paired, paired_ratio, sign_flip


def test_mean_is_over_videos_and_the_draw_is_over_prompts() -> None:
    found = bootstrap({"a": [1.0, 2.0, 3.0], "b": [6.0]}, resamples=2000, seed=0)
    assert found.mean == 3.0
    # Two prompts have three kinds of resample: only a (mean 2), both (3), only b (6).
    assert (found.low, found.high) == (2.0, 6.0)


def test_seeds_of_a_prompt_are_one_draw() -> None:
    once = bootstrap({str(k): [float(k)] for k in range(8)}, resamples=500, seed=3)
    thrice = bootstrap({str(k): [float(k)] * 3 for k in range(8)}, resamples=500, seed=3)
    assert once == thrice


def test_a_plain_list_is_one_value_a_prompt() -> None:
    values = [1.0, 4.0, 2.0, 8.0]
    assert bootstrap(values, resamples=300, seed=2) == bootstrap({str(k): [v] for k, v in enumerate(values)}, resamples=300, seed=2)


def test_order_of_reading_changes_nothing() -> None:
    values = {str(k): [float(k * k % 7)] for k in range(9)}
    turned = dict(reversed(values.items()))
    assert bootstrap(values, resamples=200, seed=1) == bootstrap(turned, resamples=200, seed=1)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        found = bootstrap({str(k): [float(v)] for k, v in enumerate(rng.normal(size=32))}, resamples=400, seed=trial)
        hits += found.low <= 0 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_one_prompt_has_no_interval() -> None:
    found = bootstrap({"a": [1.0, 3.0]}, resamples=100, seed=0)
    assert found.mean == 2.0 and not found.has_ends


def test_nothing_to_average_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        bootstrap({"a": [1.0], "b": []}, resamples=10, seed=0)


@pytest.mark.parametrize("n", [2, 5, 7])
def test_smallest_p_is_exact(n: int) -> None:
    """All differences equal: of 2^n sign patterns only the two constant ones reach the mean."""
    assert sign_flip([1.0] * n, resamples=10_000, seed=0) == 2 / 2**n


def test_p_by_hand() -> None:
    # |±1 ±2 ±3| >= |1 + 2 - 3| = 0 always; >= 4 (as in -1 + 2 + 3) for ±6 and ±4: 4 of 8 patterns
    assert sign_flip([1.0, 2.0, -3.0], resamples=100, seed=0) == 1.0
    assert sign_flip([-1.0, 2.0, 3.0], resamples=100, seed=0) == 0.5


def test_a_one_sided_p_by_hand() -> None:
    # of ±1 ±2 ±3, the means of 1 + 2 + 3 = 6 and 6 - 2 = 4 are those of one and of two patterns; every pattern reaches -6
    assert sign_flip([1.0, 2.0, 3.0], resamples=100, seed=0, one_sided=True) == 1 / 8
    assert sign_flip([-1.0, 2.0, 3.0], resamples=100, seed=0, one_sided=True) == 2 / 8
    assert sign_flip([-1.0, -2.0, -3.0], resamples=100, seed=0, one_sided=True) == 1.0
    assert sign_flip([0.0], resamples=100, seed=0, one_sided=True) == 1.0 and sign_flip([2.0], resamples=9, seed=0, one_sided=True) == 0.5


def test_an_effect_is_in_deviations_of_the_differences_and_has_an_interval() -> None:
    values = [1.0, 2.0, 3.0, 2.0, 1.0, 3.0]
    found = measure_effect(values, resamples=500, seed=0)
    assert found and found.mean == pytest.approx(2 / np.std(values, ddof=1)) and 0 < found.low < found.mean < found.high
    tenfold = measure_effect([10 * value for value in values], resamples=500, seed=0)
    assert tenfold and tenfold == pytest.approx(found)
    assert measure_effect([1.0], resamples=10, seed=0) is None and measure_effect([2.0, 2.0], resamples=10, seed=0) is None
    both = paired({(str(k), 0): 0.0 for k in range(6)}, {(str(k), 0): v for k, v in enumerate(values)}, resamples=500, seed=0)
    assert both and both.effect == found and both.prompts == 6


def test_drawn_p_agrees_with_the_exact_one() -> None:
    values = np.random.default_rng(4).normal(0.4, 1, 12).tolist()
    exact = sign_flip(values, resamples=5000, seed=0)
    drawn = sign_flip(values, resamples=4000, seed=0)
    assert exact != drawn and abs(exact - drawn) < 0.03


def test_paired_uses_only_shared_pairs() -> None:
    first = {("a", 0): 1.0, ("b", 0): 2.0, ("only first", 0): 100.0}
    second = {("a", 0): 2.0, ("b", 0): 5.0, ("b", 1): -100.0}
    found = paired(first, second, resamples=200, seed=0)
    assert found is not None
    assert (found.first, found.second, found.change.mean) == (1.5, 3.5, 2.0)
    assert found.p == 0.5  # two prompts, four patterns, two as large


def test_pairing_removes_what_prompts_have_in_common() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(scale=50, size=20)
    first = {(str(k), 0): float(v) for k, v in enumerate(base)}
    second = {(str(k), 0): float(v + 1) for k, v in enumerate(base)}
    found = paired(first, second, resamples=200, seed=0)
    assert found is not None and found.change.low == pytest.approx(1) and found.change.high == pytest.approx(1)


def test_nothing_shared_is_no_difference() -> None:
    assert paired({("a", 0): 1.0}, {("b", 0): 1.0}, resamples=10, seed=0) is None


def test_a_ratio_of_means_is_compared_over_the_videos_of_both() -> None:
    """Each prompt's videos are drawn together; a video that lacks one of the four values counts nowhere."""
    keys = [(f"p{i}", seed) for i in range(20) for seed in range(2)]
    tops, bottoms = {key: 2.0 + i % 3 for i, key in enumerate(keys)}, {key: 10.0 for key in keys}
    halved = {key: value / 2 for key, value in tops.items()}
    halved["p0", 7] = 1000.0
    found = paired_ratio((tops, bottoms), (halved, bottoms), resamples=200, seed=0)
    assert found and found.first == pytest.approx(np.mean([*tops.values()]) / 10) and found.second == pytest.approx(found.first / 2)
    assert found.change.low < found.change.mean < found.change.high < 0
    alone = bootstrap_ratio(tops, bottoms, resamples=200, seed=0)
    assert alone and alone.low < found.first < alone.high and alone.mean == pytest.approx(found.first)
    assert bootstrap_ratio(tops, {}, resamples=200, seed=0) is None
