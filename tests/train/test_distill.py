import pytest
import torch

from cf_model.model.memory import empty_memory
from cf_model.model.rollout import rollout
from cf_model.model.view import TeacherView, sample_window
from cf_model.train.distill import compute_critic_loss, compute_generator_gradient, replay_window
from tests.small import FLOW, SHAPE, denoiser, normal, rng, rolling, spec

TEXT = normal(2, 5, 8, seed=3)
VIEW = TeacherView(context="sparse", sink=3, slow=12, fast=6, stride=6, chunk=3, context_sigma="zero", context_pass="joint")
ROLLOUT = rolling()
NULL = torch.zeros(5, 8)


class Line:
    """A stub score whose x_0 is a multiple of x_t: v = (x_t - a x_t) / σ."""

    def __init__(self, factor):
        self.factor, self.calls = factor, 0

    def velocity(self, x_t, sigma, text):
        self.calls += 1
        # the prompt shifts the answer, so that guidance can be seen
        return (x_t - self.factor * x_t - text.mean()) / sigma.view(-1, 1, 1, 1, 1)


def gradient(x, real, fake, guidance=1.0, passes="apart"):
    nothing = x[:, :0]
    return compute_generator_gradient(
        x,
        TEXT,
        real=real,
        fake=fake,
        context=nothing,
        view=VIEW,
        flow=FLOW,
        rng=rng(),
        guidance=guidance,
        null=NULL,
        guidance_passes=passes,
    )


def test_equal_scores_move_nothing():
    x = normal(2, 6, *SHAPE)
    assert torch.equal(gradient(x, Line(0.6), Line(0.6))[0], torch.zeros_like(x))


def test_gradient_is_the_difference_over_the_distance():
    x = normal(2, 6, *SHAPE)
    g, values = gradient(x, Line(0.6), Line(0.7))
    noisy_rng = rng()
    sigma = FLOW.sample_score_sigma(2, noisy_rng).view(-1, 1, 1, 1, 1)
    x_t = (1 - sigma) * x + sigma * torch.randn(x.shape, generator=noisy_rng)
    distance = (x - 0.6 * x_t - TEXT.mean()).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    assert torch.allclose(g, 0.1 * x_t / distance, atol=1e-5)
    assert values["normaliser"] == pytest.approx(float(distance.mean()), rel=1e-4)


def test_no_guidance_costs_no_second_pass_and_guidance_follows_the_convention():
    x, real = normal(2, 6, *SHAPE), Line(0.6)
    one, _ = gradient(x, real, Line(0.6), guidance=1.0)
    assert real.calls == 1
    three, _ = gradient(x, real, Line(0.6), guidance=3.0)
    assert real.calls == 3
    # null + 3 (cond - null): the real x_0 moves on by 2 mean(text), so fake - real is -2 mean(text)
    assert torch.equal(one, torch.zeros_like(x)) and bool((three.sign() == -TEXT.mean().sign()).all())


def test_a_score_that_is_not_finite_is_not_hidden():
    """The optimiser leaves such a step out, and the loop names it (tests/train/test_loop.py); zeros would still move the weights."""
    x = normal(2, 6, *SHAPE)
    assert gradient(x, Line(float("nan")), Line(0.6))[0].isnan().all()


def test_the_gradient_has_no_scale():
    """k times the distance between the scores and k times that to the real one are the same gradient."""

    class Away:
        """A score whose x_0 lies `by` beside x, whatever the level."""

        def __init__(self, x, by):
            self.x, self.by = x, by

        def velocity(self, x_t, sigma, text):
            return (x_t - self.x - self.by) / sigma.view(-1, 1, 1, 1, 1)

    x, by, other = normal(2, 6, *SHAPE), normal(2, 6, *SHAPE, seed=4), normal(2, 6, *SHAPE, seed=5)
    one, _ = gradient(x, Away(x, by), Away(x, other))
    five, _ = gradient(x, Away(x, 5 * by), Away(x, 5 * other))
    assert one.abs().mean() > 0.1 and torch.allclose(one, five, atol=1e-4)


def test_the_critics_loss_is_weighted_by_its_level():
    x, noisy_rng = normal(2, 6, *SHAPE), rng()
    sigma = FLOW.sample_score_sigma(2, noisy_rng)

    class One:
        """Wrong by exactly 1 everywhere."""

        def velocity(self, x_t, sigma, text):
            return (x_t - x) / sigma.view(-1, 1, 1, 1, 1) + 1

    def loss(weight):
        return float(compute_critic_loss(x, TEXT, fake=One(), context=x[:, :0], view=VIEW, flow=FLOW, rng=rng(), weight=weight))

    assert loss("uniform") == pytest.approx(1, rel=1e-4)
    assert loss("bell") == pytest.approx(float(FLOW.loss_weight(sigma).mean()), rel=1e-4)


def test_critic_loss_of_a_perfect_critic_is_zero():
    x = normal(2, 6, *SHAPE)

    class Oracle:
        def velocity(self, x_t, sigma, text):
            return (x_t - x) / sigma.view(-1, 1, 1, 1, 1)

    assert float(compute_critic_loss(x, TEXT, fake=Oracle(), context=x[:, :0], view=VIEW, flow=FLOW, rng=rng(), weight="uniform")) < 1e-8


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("skip", [0, 1])
def test_replay_is_the_stop_gradient_reference(float64, skip, checkpointing):
    """Rollout, memory and eviction in float64; the reference builds each chunk's graph at once, its memory constant."""
    model, plan = denoiser().double(), rolling(skip_first=skip)
    text, g = TEXT.double(), normal(2, 9, *SHAPE, seed=9).double()
    small = spec(sink=3, slow=2, fast=6, tau=1.0)
    if checkpointing:
        model.transformer.enable_gradient_checkpointing()
    made = rollout(model, text, 30, SHAPE, spec=plan, memory=small, flow=FLOW, rng=rng(7))
    assert int(made.memory.promoted_count.min()) > 2, "frames were evicted from the slow part, too"
    replay_window(model, made, g, text)
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    model.transformer.disable_gradient_checkpointing()
    video = by_hand(model, text, small, skip)
    # Passes without gradient compute the same by fewer operations, whose norms are in float32, as diffusers' are.
    assert torch.allclose(video.detach(), made.video, rtol=0, atol=1e-6)
    target, carried = video[:, 21 + 3 * skip :], g[:, 3 * skip :]
    (0.5 * torch.nn.functional.mse_loss(target, (target - carried).detach())).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert expected.norm() > 0 and float((got - expected).norm() / expected.norm()) < 1e-6


def by_hand(model, text, memory, skip):
    """The rollout once more: one graph for the scored chunks' last passes, nothing of it in what is remembered."""
    noise, frames, state = rng(7), [], empty_memory(memory)
    exit_at, sigmas = int(torch.randint(4, (), generator=noise)), FLOW.shift_levels(rolling().levels)
    for first in range(0, 30, 3):
        learns = first >= 21 + 3 * skip
        steps = sigmas[: exit_at + 1] if learns else sigmas
        x = torch.randn(2, 3, *SHAPE, generator=noise)
        for i, sigma in enumerate(steps):
            if i:
                x = (1 - sigma) * x_0.detach() + sigma * torch.randn(x.shape, generator=noise)
            with torch.set_grad_enabled(learns and i == len(steps) - 1):
                x_0 = model(x, torch.full((2,), sigma), text, state)
        frames.append(x_0)
        state = model.remember(x_0.detach(), text, state)
    return torch.cat(frames, dim=1)


RELEASED = {"interval": 1, "begin": 2, "when": "enqueue", "timing": "first_call", "fill": "early_raw", "scope": "layer", "tau": 1.0}


@pytest.mark.parametrize(("memory", "plan"), [(RELEASED, {"skip_first": 1, "full_first": 2}), ({}, {"renoise": "own", "exit": "last"})])
def test_replay_of_other_readings(float64, memory, plan):
    """Each target alone makes the frames that are scored, and chunk by chunk equals one graph of all of them."""
    model, text = denoiser().double(), TEXT.double()
    made = rollout(model, text, 30, SHAPE, spec=rolling(**plan), memory=spec(**memory), flow=FLOW, rng=rng(7))
    g = normal(2, 9, *SHAPE, seed=9).double()
    replay_window(model, made, g, text)
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    carry = [t for t in made.targets if t.grad]
    x_0 = torch.cat([model(t.x_t, torch.full((2,), t.sigma), text, t.memory) for t in carry], dim=1)
    first = carry[0].first
    assert torch.allclose(x_0, made.video[:, first:], rtol=0, atol=1e-6) and [t.memory.frame_count for t in made.targets] == [21, 24, 27]
    (0.5 * torch.nn.functional.mse_loss(x_0, (x_0 - g[:, first - 21 :]).detach())).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert expected.norm() > 0 and float((got - expected).norm() / expected.norm()) < 1e-6


def test_a_training_forward_writes_into_nothing_that_another_reads(float64):
    """Every tensor that a target holds is the same, to the bit, after the replay of all of them."""
    model, text = denoiser().double(), TEXT.double()
    made = rollout(model, text, 30, SHAPE, spec=rolling(), memory=spec(slow=2, tau=1.0), flow=FLOW, rng=rng(7))
    held = [t.x_t for t in made.targets] + [k for t in made.targets for part in t.memory.past(0) for k in part]
    before = [tensor.clone() for tensor in held]
    replay_window(model, made, normal(2, 9, *SHAPE, seed=9).double(), text)
    assert all(torch.equal(tensor, old) for tensor, old in zip(held, before, strict=True))
    assert not any(tensor.requires_grad for tensor in held)


# docs/method.md, "Teacher's context"
@pytest.mark.parametrize(
    ("start", "slow"),
    [(21, [3, 9]), (63, list(range(3, 52, 6))), (84, list(range(6, 73, 6)))],
)
def test_sparse_view(start, slow):
    assert VIEW.context_frames(start) == [0, 1, 2, *slow, *range(start - 6, start)]


def test_views_of_a_short_past_have_no_frame_twice():
    for start in range(40):
        frames = VIEW.context_frames(start)
        assert frames == sorted(set(frames)) and all(0 <= f < start for f in frames) and len(frames) <= 21


@pytest.mark.parametrize("announced", ["shared", "zero"])
def test_levels_that_context_frames_are_announced_with(announced):
    class Listener:
        def velocity(self, x_t, sigma, text):
            self.sigma = sigma
            return x_t

    view = TeacherView(context="sparse", sink=3, slow=12, fast=6, stride=6, chunk=3, context_sigma=announced, context_pass="joint")
    x, sigma, model = normal(2, 6, *SHAPE), torch.tensor([0.5, 0.9]), Listener()
    assert torch.equal(view.velocity(model, x, sigma, TEXT, normal(2, 4, *SHAPE, seed=2)), x)
    levels = model.sigma if model.sigma.ndim == 2 else model.sigma[:, None].expand(2, 10)
    assert torch.equal(levels[:, 4:], sigma[:, None].expand(2, 6))
    assert torch.equal(levels[:, :4], sigma[:, None].expand(2, 4) if announced == "shared" else torch.zeros(2, 4))


def test_the_sampler_moves_away_from_the_null_prompt():
    """One Euler step from noise to data with a constant velocity: x = noise - (null + 3 (cond - null))."""

    class Constant:
        def velocity(self, x_t, sigma, text):
            return torch.ones_like(x_t) * text.mean()

    nothing, null = torch.zeros(2, 0, *SHAPE), normal(5, 8, seed=8)
    how = {"view": VIEW, "flow": FLOW, "steps": 1, "guidance": 3.0, "null": null}
    made = sample_window(Constant(), TEXT, nothing, (3, *SHAPE), **how, guidance_passes="apart", rng=rng())
    velocity = null.mean() + 3 * (TEXT.mean() - null.mean())
    assert torch.allclose(made, torch.randn((2, 3, *SHAPE), generator=rng()) - velocity, atol=1e-6)
