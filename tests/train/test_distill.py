import pytest
import torch

from cf_model.model.memory import ContextMemory
from cf_model.model.rollout import HorizonSpec, rollout
from cf_model.model.view import TeacherView
from cf_model.train.distill import critic_loss, generator_gradient
from cf_model.train.student import replay
from tests.small import FLOW, SHAPE, denoiser, normal, rng, rolling, spec

TEXT = normal(2, 5, 8, seed=3)
VIEW = TeacherView(context="sparse", sink=3, slow=12, fast=6, stride=6, context_sigma="zero")
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


def gradient(x, real, fake, guidance=1.0):
    empty = x[:, :0]
    return generator_gradient(
        x, TEXT, real=real, fake=fake, context=empty, view=VIEW, flow=FLOW, rng=rng(), guidance=guidance, null=NULL
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


def test_a_score_that_is_not_finite_moves_nothing():
    x = normal(2, 6, *SHAPE)
    assert torch.equal(gradient(x, Line(float("nan")), Line(0.6))[0], torch.zeros_like(x))


def test_critic_loss_of_a_perfect_critic_is_zero():
    x = normal(2, 6, *SHAPE)

    class Oracle:
        def velocity(self, x_t, sigma, text):
            return (x_t - x) / sigma.view(-1, 1, 1, 1, 1)

    assert float(critic_loss(x, TEXT, fake=Oracle(), context=x[:, :0], view=VIEW, flow=FLOW, rng=rng(), weight="uniform")) < 1e-8


def test_replay_is_the_stop_gradient_reference():
    """Rollout, memory and eviction in float64; the reference builds each chunk's graph at once, its memory constant."""
    model = denoiser().double()
    text = TEXT.double()
    small = spec(sink=3, slow=2, fast=6)

    def generator():
        torch.set_default_dtype(torch.float64)
        return rng(7)

    try:
        made = rollout(model, text, 24, SHAPE, spec=ROLLOUT, memory=small, flow=FLOW, rng=generator())
        g = normal(2, 9, *SHAPE, seed=9).double()
        replay(model, made, g, text)
        got = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        noise, frames, state = rng(7), [], ContextMemory(small)
        exit_at = int(torch.randint(4, (), generator=noise))
        sigmas = ROLLOUT.sigmas(FLOW)
        for first in range(0, 24, 3):
            steps = sigmas[: exit_at + 1] if first >= 15 else sigmas
            x = torch.randn(2, 3, *SHAPE, generator=noise)
            for i, sigma in enumerate(steps):
                if i:
                    x = (1 - sigma) * x_0.detach() + sigma * torch.randn(x.shape, generator=noise)
                with torch.set_grad_enabled(first >= 15 and i == len(steps) - 1):
                    x_0 = model(x, torch.full((2,), sigma), text, state)
            frames.append(x_0)
            state = model.remember(x_0.detach(), text, state)
        video = torch.cat(frames, dim=1)
        assert torch.equal(video.detach(), made.video)
        target = video[:, 15:]
        (0.5 * torch.nn.functional.mse_loss(target, (target - g).detach())).backward()
        for ours, p in zip(got, model.parameters(), strict=True):
            assert torch.allclose(ours, p.grad, rtol=1e-6, atol=1e-12)
        assert sum(float(q.abs().sum()) for q in got) > 0
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("skip", [0, 1])
def test_which_chunks_carry_gradient(skip):
    made = rollout(
        denoiser(),
        TEXT,
        18,
        SHAPE,
        spec=rolling(levels=(1.0, 0.5), skip_first=skip),
        memory=spec(),
        flow=FLOW,
        rng=rng(),
    )
    assert [(t.first, t.grad) for t in made.targets] == [(9, skip == 0), (12, True), (15, True)]


def test_the_target_stops_at_one_random_level_and_the_context_is_clean():
    levels, exits = ROLLOUT.sigmas(FLOW), set()
    for seed in range(12):
        made = rollout(denoiser(), TEXT, 15, SHAPE, spec=ROLLOUT, memory=spec(), flow=FLOW, rng=rng(seed))
        assert {t.sigma for t in made.targets} == {levels[made.exits[0]]}
        exits.add(made.exits[0])
    assert exits == {0, 1, 2, 3}


def test_lengths_grow_with_the_curriculum():
    horizon, noise = HorizonSpec(shortest=42, longest=120, decay=100, mode="linear"), rng()
    assert {horizon.sample(0, 3, noise) for _ in range(200)} == {42}
    assert {horizon.sample(100, 3, noise) for _ in range(2000)} == set(range(42, 121, 3))
    assert {horizon.sample(10**9, 3, noise) for _ in range(2000)} == set(range(42, 121, 3))


# docs/method.md 6.5
@pytest.mark.parametrize(
    ("start", "slow"),
    [(21, [3, 9]), (63, list(range(3, 52, 6))), (84, list(range(6, 73, 6)))],
)
def test_sparse_view(start, slow):
    assert VIEW.frames(start) == [0, 1, 2, *slow, *range(start - 6, start)]


def test_views_of_a_short_past_have_no_frame_twice():
    for start in range(40):
        frames = VIEW.frames(start)
        assert frames == sorted(set(frames)) and all(0 <= f < start for f in frames) and len(frames) <= 21
