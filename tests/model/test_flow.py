import pytest
import scipy.stats
import torch

from cf_model.model.flow import BatchGenerator, Flow, add_noise, derive_seed, draw_gaussian, draw_uniform, to_velocity, to_x0
from tests.small import normal, rng


def test_warped_levels_are_those_of_wan():
    levels = Flow(5.0, 0.02, 0.98).warp(torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64))
    assert torch.allclose(1000 * levels, torch.tensor([1000, 937.5, 833.33333333, 625], dtype=torch.float64))


@pytest.mark.parametrize(
    ("shift", "levels", "warped"),
    [
        (3.0, [1, 0.75, 0.5, 0.25], [1000, 900, 750, 500]),
        (8.0, [1, 0.75, 0.5, 0.25], [1000, 960, 888.889, 727.273]),
        (5.0, [1, 0.8, 0.6, 0.4, 0.2], [1000, 952.381, 882.353, 769.231, 555.556]),  # Rolling Forcing's
    ],
)
def test_warped_levels_of_the_neighbours(shift, levels, warped):
    found = 1000 * Flow(shift, 0.02, 0.98).warp(torch.tensor(levels, dtype=torch.float64))
    assert found.tolist() == pytest.approx(warped, abs=1e-3)


def test_weights_of_levels_are_those_wan_was_trained_with():
    # docs/method.md, "Flow matching": measured on the original's table
    table = Flow(5.0, 0.02, 0.98).warp(1 - torch.arange(1000) / 1000)
    rows = [int((table - t / 1000).abs().argmin()) for t in (1000, 937.5, 833.3333, 625, 500, 200, 20)]  # it looks up the nearest
    assert Flow(5.0, 0.02, 0.98).loss_weight(table[rows]).tolist() == pytest.approx([0, 0.398, 1.025, 1.914, 2.076, 1.214, 0.126], abs=1e-3)
    assert float(Flow(5.0, 0.02, 0.98).loss_weight(table).mean()) == pytest.approx(1, abs=1e-5)


def test_noise_and_back():
    x, noise, sigma = normal(3, 2, 4).double(), normal(3, 2, 4, seed=2).double(), torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    x_t = add_noise(x, noise, sigma)
    assert torch.allclose(to_x0(x_t, noise - x, sigma), x, atol=1e-12)
    assert torch.allclose(to_velocity(x_t, x, sigma), noise - x, atol=1e-12)


def test_score_levels_have_the_published_quantiles():
    # measured on Self-Forcing's law with a million draws (docs/method.md, "Flow matching"): mean 746, 5/25/50/75 % = 208/625/833/937.5
    sigma = 1000 * Flow(5.0, 0.02, 0.98).sample_score_sigma(1_000_000, rng())
    assert abs(float(sigma.mean()) - 746) < 2
    assert torch.allclose(sigma.quantile(torch.tensor([0.05, 0.25, 0.5, 0.75]))[:4], torch.tensor([208.0, 625.0, 833.0, 937.5]), atol=2)
    assert float(sigma.max()) == pytest.approx(980) and float((sigma > 979.99).float().mean()) == pytest.approx(0.092, abs=0.003)


@pytest.mark.parametrize("values", [(0.5, 0.02, 0.98), (5.0, 0.98, 0.02), (5.0, 0.02, 1.2)])
def test_bad_values_are_refused_by_name(values):
    with pytest.raises(ValueError, match=r"^(shift|sigma_min) is"):
        Flow(*values)


def streams(*videos):
    return BatchGenerator(videos, shared=(5, 3))


def test_a_videos_noise_is_its_own_wherever_it_stands():
    """The same in any company and in any place of it; a further draw, which is the next chunk or level, is another."""
    names = [(5, 3, row) for row in range(4)]
    together = streams(*names)
    first, second = draw_gaussian((4, 3, 2, 5), together), draw_uniform((4, 7), together)
    for order in ([2], [3, 0], [1, 2, 3]):
        some = streams(*(names[row] for row in order))
        assert torch.equal(draw_gaussian((len(order), 3, 2, 5), some), first[order])
        assert torch.equal(draw_uniform((len(order), 7), some), second[order])
    assert not torch.equal(draw_gaussian((4, 3, 2, 5), together), first)
    with pytest.raises(AssertionError, match="3 rows are drawn for 4 videos"):
        draw_gaussian((3, 2), together)


def test_what_the_batch_shares_does_not_depend_on_its_videos():
    for videos in ([], [(5, 3, 0)], [(5, 3, 7), (5, 3, 8)]):
        rng = streams(*videos)
        draw_gaussian((len(videos), 9), rng) if videos else None
        assert torch.randint(1000, (3,), generator=rng).tolist() == torch.randint(1000, (3,), generator=streams()).tolist()


def test_every_identity_has_a_stream_of_its_own():
    """Seeds, steps and rows that are neighbours, and names of other lengths, which must not be padded to the same."""
    names = [(seed, step, row) for seed in range(4) for step in range(100) for row in range(16)]
    names += [(seed,) for seed in range(4)] + [(seed, step) for seed in range(4) for step in range(100)] + [(2**62,), (2**32 + 1, 0)]
    assert len({derive_seed(*name) for name in names}) == len(names)
    # what torch's generator on a CPU takes of a seed
    assert len({derive_seed(*name) % 2**32 for name in names}) == len(names)


def test_noise_is_normal_within_streams_and_across_them():
    videos, numbers = 512, 512
    drawn = draw_gaussian((videos, numbers), streams(*((1, step, row) for step in range(32) for row in range(16)))).double()
    assert scipy.stats.kstest(drawn.flatten(), "norm").pvalue > 0.01
    scale = drawn.numel() ** -0.5
    for power, moment, spread in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert abs(float(drawn.pow(power).mean()) - moment) < 4 * spread * scale
    # correlations of any two videos, and of neighbouring numbers: mean 0 and variance 1 / numbers
    correlation = torch.corrcoef(drawn)[~torch.eye(videos, dtype=torch.bool)]
    assert abs(float(correlation.var() * numbers) - 1) < 0.05 and float(correlation.abs().max()) < 0.3
    assert abs(float((drawn[:, 1:] * drawn[:, :-1]).mean())) < 4 * scale


def test_a_mean_of_levels_over_steps_is_that_of_their_law():
    """One number from each of many streams, as the noise levels of a training are drawn."""
    levels = torch.cat([draw_uniform((16,), streams(*((1, step, row) for row in range(16)))) for step in range(250)])
    assert scipy.stats.kstest(levels, "uniform").pvalue > 0.01
