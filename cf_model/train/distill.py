"""Distribution matching distillation, with or without a context: two losses, each headed by its equation, and their way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cf_model.model.flow import Flow, Noise, add_noise, gaussian, to_x0
from cf_model.model.memory import Memory
from cf_model.model.rollout import Rollout
from cf_model.model.view import Passes, Score, TeacherView, guided


@torch.no_grad()
def generator_gradient(
    x: Float[Tensor, "B F C H W"],
    text: Float[Tensor, "B T E"],
    *,
    real: Score,
    fake: Score,
    context: Float[Tensor, "B K C H W"],
    view: TeacherView,
    flow: Flow,
    rng: Noise,
    guidance: float,
    guidance_passes: Passes,
    null: Float[Tensor, "T E"],
    past: Memory | None = None,
) -> tuple[Float[Tensor, "B F C H W"], dict[str, float]]:
    """Where the student's frames x should not go: (fake - real) / mean|x - real| at one random noise level.

    `# Paper:` eq. 4 without a context, eq. 6 with one; the normaliser is DMD's, one a sample. Both scores see the same
    clean context; `past` is what the fake one has read of it already (`TeacherView.read`), None to read it here. Where x is
    the real score's x_0 already there is nothing to gain: 0 / 0 is 0.
    """
    sigma = flow.sample_score_sigma(len(x), rng)
    x_t = add_noise(x, gaussian(x.shape, rng), sigma)
    fake_x0 = to_x0(x_t, view.velocity(fake, x_t, sigma, text, context, past), sigma)
    real_velocity = guided(real, text, context, view=view, guidance=guidance, null=null, passes=guidance_passes)(x_t, sigma)
    real_x0 = to_x0(x_t, real_velocity, sigma)
    normaliser = (x - real_x0).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    gradient = (fake_x0 - real_x0) / torch.where(normaliser == 0, torch.inf, normaliser)  # what isn't a number goes on: a bad step
    seen = {"normaliser": normaliser.mean(), "score_distance": (fake_x0 - real_x0).abs().mean(), "dm_gradient": gradient.abs().mean()}
    return gradient, {name: float(value) for name, value in seen.items()}


def critic_loss(
    x: Float[Tensor, "B F C H W"],
    text: Float[Tensor, "B T E"],
    *,
    fake: Score,
    context: Float[Tensor, "B K C H W"],
    view: TeacherView,
    flow: Flow,
    rng: torch.Generator,
    weight: Literal["uniform", "bell"],
    past: Memory | None = None,
) -> Float[Tensor, ""]:
    """Flow matching of the critic on the student's own frames x, after the same context: mean w(σ) |v - (ε - x)|².

    `past`: what the critic has read of the context, with its graph; None to read it here.
    """
    sigma = flow.sample_score_sigma(len(x), rng)
    noise = gaussian(x.shape, rng)
    velocity = view.velocity(fake, add_noise(x, noise, sigma), sigma, text, context, past)
    error = (velocity - (noise - x)).square().mean(dim=(1, 2, 3, 4))
    return (error * flow.weight(sigma) if weight == "bell" else error).mean()


def replay(
    student: Callable[..., Tensor],
    made: Rollout,
    gradient: Float[Tensor, "B F C H W"],
    text: Tensor,
    *,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> None:
    """Back-propagates `gradient` of 0.5 mse(x, (x - gradient).detach()) into the student, one chunk at a time.

    Each scored chunk's last pass is run again with a graph, against the memory it had, which is constant. So the
    gradient stops exactly at the context, and memory is that of one chunk however long the rollout was.
    """
    carry = [target for target in made.targets if target.grad]
    numbers = sum(target.x_t.numel() for target in carry)
    for target in carry:
        at = target.first - made.window.start
        sigma = target.x_t.new_full((len(target.x_t),), target.sigma)
        x_0 = student(target.x_t, sigma, text, target.memory)
        backward((x_0 * gradient[:, at : at + x_0.shape[1]]).sum().div(numbers))
