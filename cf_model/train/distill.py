"""Distribution matching distillation, with or without a context: the student's gradient, the critic's loss, and backpropagation.

Words: the real score s_T is the teacher's, the fake score s_θ the critic's. A score is used through its estimate of x_0, because
s(x_t, t) = -(x_t - (1 - σ) x_0) / σ² makes a difference of scores a multiple of the difference of the two x_0 (w_t α_t in eqs. 4, 6).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cf_model.model.flow import Flow, Noise, add_noise, draw_gaussian, to_x0
from cf_model.model.memory import Memory
from cf_model.model.rollout import Rollout
from cf_model.model.view import GuidancePasses, Score, TeacherView, guide_velocity


@torch.no_grad()
def compute_generator_gradient(
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
    guidance_passes: GuidancePasses,
    null: Float[Tensor, "T E"],
    past: Memory | None = None,
    filled: Bool[Tensor, "B K"] | None = None,
) -> tuple[Float[Tensor, "B F C H W"], dict[str, Tensor]]:
    """Compute the direction that the student's frames x must leave: (fake - real) / mean|x - real| at one random noise level.

    `# Paper:` eq. 4 without a context, eq. 6 with a context; the normaliser is DMD's, one number for each sample. Both scores see
    the same clean context, of which a video has the frames that are `filled`. `past` holds the context's keys and values as the fake
    score's network has read them (`TeacherView.read_context`); None reads them here. Where x equals the real score's x_0 the gradient is 0.

    Returns the gradient, of x's shape, and values for the log, which stay on the device.
    """
    # Alg. 1, line 29: v_t = addnoise(X[L - l :], t), at one level a sample.
    sigma = flow.sample_score_sigma(len(x), rng)  # [B]
    x_t = add_noise(x, draw_gaussian(x.shape, rng), sigma)
    # Alg. 1, line 30: s_fake(v_t, t, v_c) and s_real(v_t, t, v_c). Only the real score has guidance.
    fake_x0 = to_x0(x_t, view.velocity(fake, x_t, sigma, text, context, past, filled), sigma)
    guided = guide_velocity(real, text, context, view=view, guidance=guidance, null=null, passes=guidance_passes, filled=filled)
    real_x0 = to_x0(x_t, guided(x_t, sigma), sigma)
    # DMD's w_t: one positive number a sample, [B, 1, 1, 1, 1]. A value that is not finite passes on, so that the step counts as bad.
    normaliser = (x - real_x0).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    gradient = (fake_x0 - real_x0) / torch.where(normaliser == 0, torch.inf, normaliser)
    values = {"normaliser": normaliser.mean(), "score_distance": (fake_x0 - real_x0).abs().mean(), "dm_gradient": gradient.abs().mean()}
    return gradient, values


def compute_critic_loss(
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
    filled: Bool[Tensor, "B K"] | None = None,
) -> Float[Tensor, ""]:
    """Compute the critic's flow matching loss on the student's own frames x after the same context: mean w(σ) |v - (ε - x)|².

    The critic thus follows the student's distribution, whose score s_θ eqs. 4 and 6 need (DMD). `past` holds the context's keys and
    values as the critic has read them, with their graph; None reads them here. `weight` is w(σ): 1, or Wan's bell.
    """
    sigma = flow.sample_score_sigma(len(x), rng)
    noise = draw_gaussian(x.shape, rng)
    # The same range of noise levels as the scores', because the critic must be right where its score is used.
    velocity = view.velocity(fake, add_noise(x, noise, sigma), sigma, text, context, past, filled)
    error = (velocity - (noise - x)).square().mean(dim=(1, 2, 3, 4))  # [B]
    return (error * flow.loss_weight(sigma) if weight == "bell" else error).mean()


def replay_window(
    student: Callable[..., Tensor],
    generated: Rollout,
    gradient: Float[Tensor, "B F C H W"],
    text: Tensor,
    *,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> None:
    """Backpropagate `gradient`, that of 0.5 mse(x, (x - gradient).detach()), into the student: the factor ∂G/∂θ of eqs. 4 and 6.

    Alg. 1, lines 16 to 18: of each chunk of the window the last denoising pass has a gradient. That pass is run again here, one chunk
    after the other, against the memory that it had, which is constant. So the gradient stops exactly at the context, and GPU memory
    is that of one chunk, however long the rollout was.
    """
    learning = [target for target in generated.targets if target.grad]
    numbers = sum(target.x_t.numel() for target in learning)  # the mean of the mse is over all of them
    for target in learning:
        at = target.first - generated.window.start
        sigma = target.x_t.new_full((len(target.x_t),), target.sigma)
        x_0 = student(target.x_t, sigma, text, target.memory)  # [B, chunk, C, H, W]
        # d(loss) / d(x_0) is gradient / numbers, so this scalar has the same gradient as the loss.
        backward((x_0 * gradient[:, at : at + x_0.shape[1]]).sum().div(numbers))


def measure_student_loss(generated: Rollout, gradient: Tensor) -> Tensor:
    """Return the value of the loss that `replay_window` backpropagates: 0.5 mse(x, (x - gradient).detach()) over the frames that learn."""
    chunk = generated.targets[0].x_t.shape[1]
    firsts = [target.first - generated.window.start for target in generated.targets if target.grad]
    parts = [gradient[:, first : first + chunk].square().mean() for first in firsts]
    return 0.5 * torch.stack(parts).mean()
