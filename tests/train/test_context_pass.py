"""A context read by a pass of its own: once for every noise level and both updates, with the same values as reading it again."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from cf_model.model import wan
from cf_model.model.denoiser import EXACT, Denoiser
from cf_model.model.memory import empty_memory
from cf_model.model.rollout import HorizonSpec
from cf_model.model.sizes import ModelSpec
from cf_model.model.view import GuidancePasses, TeacherView, sample_window
from cf_model.train.distill import compute_critic_loss, compute_generator_gradient
from cf_model.train.erft import ErrorBank, ErrorSpec, compute_erft_loss
from cf_model.train.student import DistillationTrainer, ScoreSpec, StudentSpec
from cf_model.train.trainer.engine import OptimizerSpec
from tests.small import FLOW, SHAPE, denoiser, normal, rng, rolling, spec

JOINT = TeacherView(context="sparse", sink=3, slow=12, fast=6, stride=6, chunk=3, context_sigma="zero", context_pass="joint")
OWN = replace(JOINT, context_pass="own")
TEXT, NULL = normal(2, 5, 8, seed=3), torch.zeros(5, 8)
X, CONTEXT = normal(2, 6, *SHAPE), normal(2, 9, *SHAPE, seed=4)


def gradients(model: Denoiser) -> Tensor:
    found = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return found


class Counted(Denoiser):
    """Says how often it read a context, and how often it looked at a target."""

    reads = looks = 0

    def read_context(self, *given: Any) -> Any:
        self.reads += 1
        return super().read_context(*given)

    def velocity(self, *given: Any) -> Tensor:  # type: ignore[override]
        self.looks += 1
        return super().velocity(*given)


def recast(model: Denoiser) -> Counted:
    model.__class__ = Counted
    return model  # type: ignore[return-value]


def test_the_context_sees_itself_and_the_target_sees_both() -> None:
    """The same as a chunk that a causal model remembers, after which another is denoised: positions 0 to 8, then 9 to 14."""
    model, sigma = denoiser(), torch.tensor([0.5, 0.9])
    with torch.no_grad():
        memory = model.remember(CONTEXT, TEXT, empty_memory(spec(sink=0, slow=0, fast=18, promote="none", positions="absolute")))
        expected = model.velocity(X, sigma, TEXT, memory)
        got = OWN.velocity(model, X, sigma, TEXT, CONTEXT)
        assert memory.query_positions(6) == list(range(9, 15)) and torch.equal(got, expected)
        assert not torch.allclose(got, JOINT.velocity(model, X, sigma, TEXT, CONTEXT), atol=1e-3), "there the context sees the target"


def test_what_was_read_serves_every_noise_level() -> None:
    model = recast(denoiser())
    with torch.no_grad():
        past = OWN.read_context(model, TEXT, CONTEXT)
        for level in (0.02, 0.5, 1.0):
            sigma = torch.full((2,), level)
            again = OWN.velocity(model, X, sigma, TEXT, CONTEXT)
            assert torch.equal(OWN.velocity(model, X, sigma, TEXT, CONTEXT, past), again)
            assert not torch.equal(again, OWN.velocity(model, X, sigma, TEXT, CONTEXT.roll(1, 1)))
    assert OWN.read_context(model, TEXT, CONTEXT[:, :0]) is None and JOINT.read_context(model, TEXT, CONTEXT) is None
    with pytest.raises(ValueError, match="context_pass is own, which reads the context at level 0, but context_sigma is shared; use"):
        replace(OWN, context_sigma="shared")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_teacher_learns_through_what_it_reads(checkpointing: bool) -> None:
    """erft_loss against the same loss by hand, and against one whose context is a constant; checkpointing changes nothing."""
    errors = ErrorSpec(0.0, 0.0, 0.0, 1.0, 0.0, "fast", 4, 2, "float32", 1_000_000, 0)
    sizes = ModelSpec(layers=2, heads=2, head_dim=12, ffn=32, freq=16, positions=256)
    model = wan.build_transformer(sizes, channels=4, text_channels=8, seed=0, compute=replace(EXACT, checkpointing=checkpointing))
    model.load_state_dict(denoiser().state_dict())
    model.train()
    levels = torch.tensor([0.4, 0.8])
    how = {"view": OWN, "bank": ErrorBank(errors, (6, *SHAPE)), "flow": FLOW, "weight": "uniform"}
    compute_erft_loss(model, X, TEXT, CONTEXT, levels, **how, step=0, rng=rng())[0].backward()  # type: ignore[arg-type]
    got = gradients(model)
    plain = denoiser()
    noise = torch.randn(X.shape, generator=rng())
    s = levels.view(2, 1, 1, 1, 1)
    everything = spec(sink=0, slow=0, fast=18, promote="none", positions="absolute")
    for constant in (False, True):
        memory = plain.remember(CONTEXT, TEXT, empty_memory(everything), grad=not constant)
        (plain.velocity((1 - s) * X + s * noise, levels, TEXT, memory) - (noise - X)).square().mean().backward()
        expected = gradients(plain)
        near = float((got - expected).norm() / expected.norm())
        assert near > 1e-2 if constant else near < 1e-5


def scores(past: bool, view: TeacherView = OWN, passes: GuidancePasses = "apart", dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """The student's gradient and the critic's, of one critic."""
    real, fake = denoiser(1).to(dtype), recast(denoiser(2)).to(dtype)
    x, context, text, null = (tensor.to(dtype) for tensor in (X, CONTEXT, TEXT, NULL))
    read = view.read_context(fake, text, context) if past else None
    how: Any = {"context": context, "view": view, "flow": FLOW, "past": read}
    torch.set_default_dtype(dtype)
    try:
        scored = {"real": real, "fake": fake, "guidance": 3.0, "guidance_passes": passes, "null": null}
        gradient, values = compute_generator_gradient(x, text, **how, **scored, rng=rng())
        loss = compute_critic_loss(x, text, fake=fake, **how, rng=rng(1), weight="bell")
    finally:
        torch.set_default_dtype(torch.float32)
    assert not gradient.requires_grad
    loss.backward()
    return gradient, values, loss.detach(), gradients(fake), fake.reads


def test_student_and_critic_share_what_the_critic_read() -> None:
    """What they would read themselves, the critic's gradient through the context included.

    The critic's to the bit; the student's up to rounding, because a context that is read without gradient takes fewer operations.
    """
    shared, twice = scores(True), scores(False)
    assert (shared[-1], twice[-1]) == (1, 2)
    assert torch.allclose(shared[0], twice[0], rtol=1e-6, atol=1e-6)
    assert {k: float(v) for k, v in shared[1].items()} == pytest.approx({k: float(v) for k, v in twice[1].items()}, rel=1e-6)
    assert torch.equal(shared[2], twice[2]) and torch.equal(shared[3], twice[3])


@pytest.mark.parametrize("view", [JOINT, OWN], ids=["joint", "own"])
def test_guidance_as_one_batch_has_the_same_gradients(view: TeacherView) -> None:
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        apart, together = (scores(False, view, passes, dtype)[0] for passes in ("apart", "together"))  # type: ignore[arg-type]
        assert apart.dtype == dtype and float(apart.abs().mean()) > 0.1
        assert float((apart - together).norm() / apart.norm()) < tolerance


@pytest.mark.parametrize("view", [JOINT, OWN], ids=["joint", "own"])
def test_the_sampler_reads_once_a_prompt(view: TeacherView) -> None:
    """As one that reads at every step, to the bit; as one batch it makes half as many passes."""

    def made(guidance: float, passes: GuidancePasses) -> tuple[Tensor, int, int]:
        model = recast(denoiser())
        how: Any = {"view": view, "flow": FLOW, "steps": 4, "null": NULL, "rng": rng()}
        return sample_window(model, TEXT, CONTEXT, (6, *SHAPE), **how, guidance=guidance, guidance_passes=passes), model.reads, model.looks

    model, x = denoiser(), torch.randn((2, 6, *SHAPE), generator=rng())
    levels = FLOW.sampler_sigmas(4)
    with torch.no_grad():
        for high, low in pairwise(levels):
            sigma = x.new_full((2,), high)
            cond, away = (view.velocity(model, x, sigma, text, CONTEXT) for text in (TEXT, NULL.expand_as(TEXT)))
            x = x + (low - high) * (away + 3.0 * (cond - away))
    apart, together = made(3.0, "apart"), made(3.0, "together")
    assert torch.equal(apart[0], x) and torch.allclose(together[0], x, atol=1e-4)
    own = view is OWN
    assert (apart[1:], together[1:]) == ((2 * own, 8), (1 * own, 4))
    assert torch.equal(made(1.0, "apart")[0], made(1.0, "together")[0]) and made(1.0, "together")[1:] == (1 * own, 4)


def job(view: TeacherView, guidance: float = 2.0) -> DistillationTrainer:
    optimizer = OptimizerSpec(1e-3, 0.0, 0.9, 0.98, 0.0, 0.0, 1.0, 0, 0.0)
    plan: Any = {"steps": 4, "critic_updates": 2, "critic_warmup": 0, "rollouts": "each", "batch": 2, "memory": spec()}
    plan |= {"rollout": rolling(levels=(1.0, 0.5), window=6), "horizon": HorizonSpec(12, 12, 0, "const")}
    plan |= {"critic_weight": "uniform", "ema": 0.9, "ema_start": 0, "ema_ramp": True, "save_every": 10}
    plan |= {"student_optimizer": optimizer, "critic_optimizer": optimizer}
    plan |= {"teacher": ScoreSpec("sparse", guidance, "apart", "refuse", "as_is")}
    models: Any = {"student": denoiser(0), "teacher": recast(denoiser(1)), "critic": recast(denoiser(1))}
    rest: Any = {"flow": FLOW, "prompts": normal(3, 5, 8), "null": NULL, "shape": SHAPE, "seed": 0}
    return DistillationTrainer(StudentSpec(**plan), **models, **rest, view=view)


class Forgetful(TeacherView):
    """Reads the context again for every pass."""

    def velocity(
        self, model: Any, x_t: Tensor, sigma: Tensor, text: Tensor, context: Tensor, past: Any = None, filled: Any = None
    ) -> Tensor:
        return super().velocity(model, x_t, sigma, text, context, None, filled)


def test_a_step_reads_the_context_once_for_both_updates() -> None:
    shared, again = job(OWN), job(Forgetful(**vars(OWN)))
    for number in range(4):
        # Up to rounding: a context that is read without gradient, for the student's update alone, takes fewer operations.
        assert {k: float(v) for k, v in shared.step(number).items()} == pytest.approx(
            {k: float(v) for k, v in again.step(number).items()}, rel=1e-6
        )
    for name in ("student", "critic"):
        pairs = zip(getattr(shared, name).parameters(), getattr(again, name).parameters(), strict=True)
        assert all(torch.allclose(a, b, rtol=0, atol=5e-6) for a, b in pairs)
    # four steps, two with an update of the student, for which the teacher reads it with the prompt and without
    assert (shared.critic.reads, shared.teacher.reads) == (4, 4)  # type: ignore[attr-defined]
    assert again.critic.reads == 4 + 6  # type: ignore[attr-defined]


@pytest.mark.parametrize("is_held", [False, True])
def test_a_joint_pass_returns_the_targets_part(is_held: bool) -> None:
    """Of a score that returns what it was given, the target comes back: also where not every video has every context frame."""

    class Echo:
        def velocity(self, x_t: Tensor, sigma: Tensor, text: Tensor, memory: Any = None, filled: Tensor | None = None) -> Tensor:
            assert x_t.shape[1] == 5 + 4 and sigma.shape == (2, 9) and (filled is not None) == is_held
            return x_t

        def read_context(self, x_0: Tensor, text: Tensor, filled: Tensor | None = None) -> Any: ...

    context, target = normal(2, 5, *SHAPE, seed=1), normal(2, 4, *SHAPE, seed=2)
    filled = torch.ones(2, 5, dtype=torch.bool) if is_held else None
    made = JOINT.velocity(Echo(), target, torch.full((2,), 0.5), normal(2, 5, 8), context, filled=filled)
    assert torch.equal(made, target)
