"""Scores with a context (eq. 6): what the bidirectional teacher s_T and critic s_θ see of the past, guidance, and a sampler.

Context frames are clean and come before the target; both models are given the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from .flow import Flow, Noise, draw_gaussian
from .memory import Memory

# with guidance: a pass of the prompts and a pass of the null prompt, or one pass of twice the batch
GuidancePasses = Literal["apart", "together"]


class Score(Protocol):
    """Teacher or critic as a view uses it (`Denoiser`)."""

    def velocity(self, x_t: Tensor, sigma: Tensor, text: Tensor, /) -> Tensor: ...


@runtime_checkable
class ContextReader(Protocol):
    """A score whose context has a pass of its own (`context_pass: own`)."""

    def velocity(self, x_t: Tensor, sigma: Tensor, text: Tensor, memory: Memory | None = None, /) -> Tensor: ...

    def read_context(self, x_0: Tensor, text: Tensor, /) -> Memory: ...


@dataclass(frozen=True)
class TeacherView:
    """Which latent frames the teacher sees before those it scores (docs/method.md, "Teacher's context"), and at which noise level.

    sparse: the sink, every `stride`-th frame after it (the newest `slow` of them), the last `fast`: the slow-fast
    memory's layout. contiguous: the last sink + slow + fast frames. none: nothing.
    """

    context: Literal["sparse", "contiguous", "none"]
    sink: int
    slow: int
    fast: int
    stride: int
    context_sigma: Literal["shared", "zero"]  # σ that the model is told for context frames: the target's, or 0
    # joint: context and target see each other in one pass. own: the context's frames see each other alone, in a pass at
    # level 0, whose keys and values the target looks at; so they are the same at every noise level, and computed once
    context_pass: Literal["joint", "own"]

    def __post_init__(self) -> None:
        if min(self.sink, self.slow, self.fast) < 0 or self.stride < 1:
            problem = f"sink is {self.sink}, slow {self.slow}, fast {self.fast}, stride {self.stride}"
            raise ValueError(f"{problem}; use 0 or more, and a stride of 1 or more")
        if self.context_pass == "own" and self.context_sigma != "zero":
            problem = f"context_pass is own, which reads the context at level 0, but context_sigma is {self.context_sigma}"
            raise ValueError(f"{problem}; use context_sigma: zero, or context_pass: joint")

    def context_frames(self, start: int) -> list[int]:
        """Return the latent frames of the context, in the order of time, for a target that begins at latent frame `start`."""
        if self.context == "none" or start == 0:
            return []
        if self.context == "contiguous":
            return list(range(max(0, start - self.sink - self.slow - self.fast), start))
        # counted back from the target: the last `fast` frames, before them every stride-th frame, never the sink again
        motion = range(max(self.sink, start - self.fast), start)
        # the slow part begins at most slow * stride frames before the fast part
        first = max(self.sink, start - self.fast - self.slow * self.stride)
        slow = range(first, start - self.fast, self.stride)[-self.slow :] if self.slow else range(0)
        return [*range(min(self.sink, start)), *slow, *motion]

    def read_context(self, model: Score, text: Float[Tensor, "B T E"], context: Float[Tensor, "B K C H W"]) -> Memory | None:
        """Return the context's keys and values, valid at any noise level; None if each pass brings the context along, or there is none."""
        if self.context_pass == "joint" or not context.shape[1]:
            return None
        assert isinstance(model, ContextReader)
        return model.read_context(context, text)

    def velocity(
        self,
        model: Score,
        x_t: Float[Tensor, "B F C H W"],
        sigma: Float[Tensor, " B"],
        text: Float[Tensor, "B T E"],
        context: Float[Tensor, "B K C H W"],
        past: Memory | None = None,
    ) -> Float[Tensor, "B F C H W"]:
        """Return v of the target after its clean context; time is 0, 1, 2, … over both, whatever was left out between them.

        joint: one bidirectional pass over both. own: over the target alone, which sees the context's keys and values, `past`;
        without `past` they are read here. Same prompt, same weights, same context: the answer is the same to the bit.
        """
        context_frames = context.shape[1]
        if not context_frames:
            return model.velocity(x_t, sigma, text)
        # own: the target's pass [B, F] looks at the context's keys and values, which know no noise level
        if self.context_pass == "own":
            assert isinstance(model, ContextReader)
            return model.velocity(x_t, sigma, text, self.read_context(model, text, context) if past is None else past)
        # joint: [B, K + F, C, H, W] in one pass, of which only the target's part is wanted
        levels: Tensor = sigma
        if self.context_sigma == "zero":
            # [B, K + F]: σ = 0 for the context, the target's level for the target
            levels = torch.cat([sigma.new_zeros(len(sigma), context_frames), sigma[:, None].expand(-1, x_t.shape[1])], dim=1)
        return model.velocity(torch.cat([context, x_t], dim=1), levels, text)[:, context_frames:]


def guide_velocity(
    model: Score,
    text: Float[Tensor, "B T E"],
    context: Float[Tensor, "B K C H W"],
    *,
    view: TeacherView,
    guidance: float,
    null: Float[Tensor, "T E"],
    passes: GuidancePasses,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return classifier-free guidance, v_null + guidance (v_cond - v_null), as a function of x_t and σ.

    A context with a pass of its own is read here, once for each prompt.
    """
    # guidance 1 is v_cond alone, so it needs no null prompt
    prompts = [text] if guidance == 1 else [text, null.expand_as(text)]
    if passes == "together":
        prompts = [torch.cat(prompts)]
    times = len(prompts[0]) // len(text)  # 2 where both prompts share a pass
    contexts = torch.cat([context] * times)
    pasts = [view.read_context(model, prompt, contexts) for prompt in prompts]

    def velocity(x_t: Tensor, sigma: Tensor) -> Tensor:
        x_t, sigma = torch.cat([x_t] * times), torch.cat([sigma] * times)
        velocities = [view.velocity(model, x_t, sigma, prompt, contexts, past) for prompt, past in zip(prompts, pasts, strict=True)]
        if guidance == 1:
            return velocities[0]
        cond, uncond = velocities if passes == "apart" else velocities[0].chunk(2)
        return uncond + guidance * (cond - uncond)

    return velocity


@torch.no_grad()
def sample_window(
    model: Score,
    text: Float[Tensor, "B T E"],
    context: Float[Tensor, "B K C H W"],
    shape: tuple[int, int, int, int],
    *,
    view: TeacherView,
    flow: Flow,
    steps: int,
    guidance: float,
    guidance_passes: GuidancePasses,
    rng: Noise,
    null: Float[Tensor, "T E"],
) -> Float[Tensor, "B F C H W"]:
    """Sample the frames after `context` by Euler steps from σ = 1 to 0; `shape` is F, C, H, W, the answer [B, F, C, H, W]."""
    # x_1 is noise
    x = draw_gaussian((len(text), *shape), rng)
    velocity = guide_velocity(model, text, context, view=view, guidance=guidance, null=null, passes=guidance_passes)
    for high, low in pairwise(flow.sampler_sigmas(steps)):
        # dx / dσ = v
        x = x + (low - high) * velocity(x, x.new_full((len(x),), high))
    return x
