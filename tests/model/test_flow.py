import pytest
import torch

from cf_model.model.flow import Flow, add_noise, to_velocity, to_x0
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
