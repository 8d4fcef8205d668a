import pytest
import torch

from cf_model.model.view import TeacherView
from cf_model.train.erft import ErrorBank, ErrorSpec, add_to_context, erft_loss
from tests.small import SHAPE, normal, rng

VIEW = TeacherView(context="sparse", sink=3, slow=12, fast=6, stride=6, context_sigma="zero")


def errors(**changes):
    values = {"context": 0.9, "latent": 0.9, "noise": 0.5, "clean": 0.0, "clean_update": 1.0, "segments": "fast"}
    return ErrorSpec(**(values | {"grids": 4, "per_grid": 2, "warmup": 0} | changes))


class Guess:
    """Predicts a constant velocity and remembers what it was shown."""

    def __init__(self, value=0.0):
        self.value = value

    def velocity(self, x_t, sigma, text):
        self.seen, self.sigma = x_t.clone(), sigma
        return torch.full_like(x_t, self.value)


def loss(model, bank, step=0, context=None, seed=0):
    x = normal(2, 6, *SHAPE)
    context = normal(2, 12, *SHAPE, seed=4) if context is None else context
    return erft_loss(model, x, normal(2, 5, 8), context, torch.tensor([0.5, 0.5]), view=VIEW, bank=bank, step=step, rng=rng(seed))


def test_mistakes_are_what_the_prediction_was_wrong_by():
    bank = ErrorBank(errors(), (6, *SHAPE))
    loss(Guess(), bank)
    # σ = 0.5: x_0 is wrong by -0.5 (v - v*) and ε by +0.5 (v - v*)
    assert bank.count.tolist() == [0, 0, 2, 0]
    assert torch.allclose(bank.stored["latent"][2], -bank.stored["noise"][2])
    x = normal(2, 6, *SHAPE)
    noise = torch.randn(x.shape, generator=rng())
    assert torch.allclose(bank.stored["latent"][2], 0.5 * (noise - x), atol=1e-6)


def test_a_full_level_replaces_its_nearest():
    bank = ErrorBank(errors(), (1, 1, 1, 1))
    for value in (0.0, 10.0, 9.0):
        bank.add(0.6, torch.full((1, 1, 1, 1), value), torch.zeros(1, 1, 1, 1))
    assert bank.stored["latent"][2].flatten().tolist() == [0.0, 9.0] and int(bank.count[2]) == 2


def test_a_clean_step_shows_the_truth_and_a_dirty_one_does_not():
    context = normal(2, 12, *SHAPE, seed=4)
    bank = ErrorBank(errors(clean=1.0), (6, *SHAPE))
    bank.add(0.5, torch.ones(6, *SHAPE), torch.ones(6, *SHAPE))
    model = Guess()
    loss(model, bank, context=context)
    assert torch.equal(model.seen[:, :12], context)
    dirty = ErrorBank(errors(context=1.0), (6, *SHAPE))
    dirty.add(0.5, torch.ones(6, *SHAPE), torch.ones(6, *SHAPE))
    loss(model, dirty, context=context)
    assert torch.equal(model.seen[:, :6], context[:, :6]), "sink and slow stay clean"
    assert torch.allclose(model.seen[:, 6:12], context[:, 6:] + 1), "the last six frames get the mistake"


def test_nothing_is_recycled_while_warming_up():
    bank = ErrorBank(errors(context=1.0, warmup=10), (6, *SHAPE))
    bank.add(0.5, torch.ones(6, *SHAPE), torch.ones(6, *SHAPE))
    context, model = normal(2, 12, *SHAPE, seed=4), Guess()
    loss(model, bank, step=9, context=context)
    assert torch.equal(model.seen[:, :12], context)


def test_the_loss_asks_for_the_clean_frames():
    """With a mistake in the target's input only, the wanted velocity is still ε - x."""
    bank = ErrorBank(errors(context=0.0, noise=0.0, latent=1.0), (6, *SHAPE))
    bank.add(0.5, torch.ones(6, *SHAPE), torch.zeros(6, *SHAPE))
    x, noise = normal(2, 6, *SHAPE), torch.randn((2, 6, *SHAPE), generator=rng())
    assert float(loss(Guess(), bank)) == pytest.approx(float((noise - x).square().mean()), rel=1e-5)


@pytest.mark.parametrize(("segments", "first"), [("all", 0), ("slow_fast", 3), ("fast", 6)])
def test_segments(segments, first):
    context = torch.zeros(12, *SHAPE)
    add_to_context(context, torch.ones(21, *SHAPE), VIEW, segments)
    assert context.flatten(1).mean(1).tolist() == [0.0] * first + [1.0] * (12 - first)


def test_bank_goes_through_a_checkpoint():
    bank = ErrorBank(errors(), (6, *SHAPE))
    loss(Guess(), bank)
    again = ErrorBank(errors(), (6, *SHAPE))
    again.load_state_dict(bank.state_dict())
    assert torch.equal(again.draw("latent", rng(3)), bank.draw("latent", rng(3))) and again.statistics() == bank.statistics()
    assert ErrorBank(errors(), (6, *SHAPE)).draw("latent", rng()) is None
