import json

import pytest
import torch
from safetensors.torch import load_file

from cf_model.model import checkpoint
from cf_model.model.view import TeacherView
from cf_model.train.erft import ErrorBank, ErrorSpec, _add_to_context, compute_erft_loss
from tests.small import FLOW, SHAPE, normal, restored, rng

VIEW = TeacherView(context="sparse", sink=3, slow=12, fast=6, stride=6, chunk=3, context_sigma="zero", context_pass="joint")


def errors(**changes):
    values = {"context": 0.9, "latent": 0.9, "noise": 0.5, "clean": 0.0, "clean_update": 1.0, "segments": "fast"}
    return ErrorSpec(**(values | {"grids": 4, "per_grid": 2, "dtype": "float32", "bytes": 1_000_000, "warmup": 0} | changes))


class Guess:
    """Predicts a constant velocity and remembers what it was shown."""

    def __init__(self, value=0.0):
        self.value = value

    def velocity(self, x_t, sigma, text):
        self.seen, self.sigma = x_t.clone(), sigma
        return torch.full_like(x_t, self.value)


def loss(model, bank, step=0, context=None, seed=0, sigma=(0.5, 0.5), weight="uniform"):
    how = {"view": VIEW, "bank": bank, "flow": FLOW, "weight": weight}
    x = normal(2, 6, *SHAPE)
    context = normal(2, 12, *SHAPE, seed=4) if context is None else context
    value, found = compute_erft_loss(model, x, normal(2, 5, 8), context, torch.tensor(sigma), **how, step=step, rng=rng(seed))
    bank.collect(found)
    return value


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
    _add_to_context(context, torch.ones(21, *SHAPE), VIEW, segments)
    assert context.flatten(1).mean(1).tolist() == [0.0] * first + [1.0] * (12 - first)


@pytest.mark.parametrize("start", range(1, 60))
def test_the_fast_segment_is_the_newest_frames_and_never_the_sink(start):
    """Early in a video the context is shorter than sink and fast part together."""
    frames = VIEW.context_frames(start)
    context = torch.zeros(len(frames), *SHAPE)
    _add_to_context(context, torch.ones(21, *SHAPE), VIEW, "fast")
    perturbed = [frame for frame, value in zip(frames, context.flatten(1).mean(1).tolist(), strict=True) if value]
    assert perturbed == [frame for frame in range(max(0, start - VIEW.fast), start) if frame >= VIEW.sink]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bank_goes_through_a_checkpoint(tmp_path, dtype):
    bank = ErrorBank(errors(dtype=dtype, per_grid=3), (6, *SHAPE))
    loss(Guess(), bank)
    loss(Guess(), bank, sigma=(0.9, 0.1))
    checkpoint.save_checkpoint(tmp_path, 1, {"bank": bank.state_dict()})
    again = ErrorBank(errors(dtype=dtype, per_grid=3), (6, *SHAPE))
    assert restored(tmp_path, {"bank": again}) == 1
    assert torch.equal(again.count, bank.count) and again.count.tolist() == [1, 0, 2, 1]
    assert all(torch.equal(again.stored[kind], bank.stored[kind]) for kind in bank.stored)
    assert torch.equal(again.draw("latent", rng(3)), bank.draw("latent", rng(3))) and again.statistics() == bank.statistics()
    assert ErrorBank(errors(), (6, *SHAPE)).draw("latent", rng()) is None


def test_a_checkpoint_holds_no_empty_places():
    bank = ErrorBank(errors(per_grid=100, bytes=10_000_000), (6, *SHAPE))
    loss(Guess(), bank)
    assert len(bank.state_dict()["latent"]) == 2


def test_bank_beside_the_teacher(tmp_path):
    bank = ErrorBank(errors(), (6, *SHAPE))
    loss(Guess(), bank)
    loss(Guess(), bank, sigma=(0.9, 0.9), seed=2)
    bank.save(tmp_path)
    held, rows = load_file(tmp_path / "errors.safetensors"), json.loads((tmp_path / "errors.json").read_text())["levels"]
    assert held["count"].tolist() == [row["count"] for row in rows] == [0, 0, 2, 2]
    assert (rows[3]["from"], rows[3]["to"]) == (0.75, 1.0) and "latent" not in rows[0]
    assert rows[3]["latent"]["rms"] == pytest.approx(float(held["latent"][2:].square().mean().sqrt()))
    assert rows[2]["noise"]["mean"] == pytest.approx(float(held["noise"][:2].mean()), abs=1e-6)


def test_a_bank_that_is_too_large_is_refused_with_what_would_fit():
    size = 2 * 4 * 6 * 4 * 4 * 4 * 4  # kinds, levels, frames, C, H, W, bytes of a number
    ErrorBank(errors(per_grid=3, bytes=3 * size), (6, *SHAPE))
    with pytest.raises(ValueError, match=rf"errors.bytes is {3 * size - 1}, .*; use errors.per_grid: 2, or errors.bytes: {3 * size}"):
        ErrorBank(errors(per_grid=3, bytes=3 * size - 1), (6, *SHAPE))
    ErrorBank(errors(per_grid=6, bytes=3 * size, dtype="bfloat16"), (6, *SHAPE))
    with pytest.raises(ValueError, match=rf"; use errors.bytes: {size}"):
        ErrorBank(errors(per_grid=1, bytes=10), (6, *SHAPE))


def test_the_weight_of_noise_levels():
    """Uniform is the plain mean; the bell weighs each video by its level."""
    levels = torch.tensor([0.5, 0.98])
    each = []
    for i in range(2):  # the other video's part is what remains of the uniform mean
        x, noise = normal(2, 6, *SHAPE)[i], torch.randn((2, 6, *SHAPE), generator=rng())[i]
        each.append((noise - x).square().mean())
    uniform, bell = (float(loss(Guess(), ErrorBank(errors(), (6, *SHAPE)), sigma=(0.5, 0.98), weight=w)) for w in ("uniform", "bell"))
    assert uniform == pytest.approx(float(sum(each)) / 2, rel=1e-5)
    assert bell == pytest.approx(float((torch.stack(each) * FLOW.loss_weight(levels)).mean()), rel=1e-5)
    assert float(FLOW.loss_weight(levels)[0]) > 2 > 0.2 > float(FLOW.loss_weight(levels)[1])
