"""Scores with a context (eq. 6): what the bidirectional teacher s_T and critic s_θ see of the past, guidance, and a sampler.

Context frames are clean and come before the target; both models are given the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .context import HeldFrames, build_plain_spec, find_held_frames, imagine_memory, list_held_frames
from .flow import Flow, Noise, draw_gaussian, draw_uniform
from .memory import Memory, MemorySpec

# with guidance: a pass of the prompts and a pass of the null prompt, or one pass of twice the batch
GuidancePasses = Literal["apart", "together"]


class Score(Protocol):
    """Teacher or critic as a view uses it (`Denoiser`)."""

    def velocity(self, x_t: Tensor, sigma: Tensor, text: Tensor, /) -> Tensor: ...


@runtime_checkable
class ContextReader(Protocol):
    """A score whose context has a pass of its own (`context_pass: own`), or frames that not every video has (`context: memory`)."""

    def velocity(
        self, x_t: Tensor, sigma: Tensor, text: Tensor, memory: Memory | None = None, filled: Tensor | None = None, /
    ) -> Tensor: ...

    def read_context(self, x_0: Tensor, text: Tensor, filled: Tensor | None = None, /) -> Memory: ...


@dataclass(frozen=True)
class TeacherView:
    """Which latent frames the teacher sees before those it scores (docs/method.md, "Teacher's context"), and at which noise level.

    memory: what the student's memory holds when the target begins, which is each video's own affair. sparse: the sink,
    every `stride`-th frame after it (the newest `slow` of them), the last `fast`. contiguous: the last sink + slow + fast
    frames. none: nothing.
    """

    context: Literal["memory", "sparse", "contiguous", "none"]
    sink: int
    slow: int
    fast: int  # memory: as the student counts it, the chunk that is being made among them; else frames of the past
    stride: int  # frames from one slow frame to the next; memory: from one tested chunk to the next
    chunk: int  # frames that the student makes at once; only `context: memory` reads it
    context_sigma: Literal["shared", "zero"]  # σ that the model is told for context frames: the target's, or 0
    # joint: context and target see each other in one pass. own: the context's frames see each other alone, in a pass at
    # level 0, whose keys and values the target looks at; so they are the same at every noise level, and computed once
    context_pass: Literal["joint", "own"]

    def __post_init__(self) -> None:
        if min(self.sink, self.slow, self.fast) < 0 or self.stride < 1:
            problem = f"sink is {self.sink}, slow {self.slow}, fast {self.fast}, stride {self.stride}"
            raise ValueError(f"{problem}; use 0 or more, and a stride of 1 or more")
        if self.chunk < 1 or (self.context == "memory" and (self.stride % self.chunk or self.fast < self.chunk)):
            problem = f"chunk is {self.chunk}, stride {self.stride} and fast {self.fast}, but a memory tests whole chunks"
            raise ValueError(f"{problem} and counts the current one as fast; use a stride of whole chunks, and fast: {self.chunk} or more")
        if self.context_pass == "own" and self.context_sigma != "zero":
            problem = f"context_pass is own, which reads the context at level 0, but context_sigma is {self.context_sigma}"
            raise ValueError(f"{problem}; use context_sigma: zero, or context_pass: joint")

    @property
    def past_fast(self) -> int:
        """Return how many of the newest frames the context shows."""
        return self.fast - self.chunk if self.context == "memory" else self.fast

    def list_starts(self, shortest: int, longest: int) -> range:
        """Return the frames in shortest..longest, both included, at which a target may begin: a student's begin with a chunk."""
        step = self.chunk if self.context == "memory" else 1
        return range(-(-shortest // step) * step, longest + 1, step)

    def context_frames(self, start: int) -> list[int]:
        """Return the latent frames of the context, in the order of time, for a target that begins at latent frame `start`.

        memory: those of a video whose every tested chunk is news, the most that any video shows.
        """
        if self.context == "none" or start == 0:
            return []
        if self.context == "memory":
            frames = self._imagine_frames(torch.ones(1, start // self.chunk, dtype=torch.bool), start)
            return frames.numbers[0].tolist()
        if self.context == "contiguous":
            return list(range(max(0, start - self.sink - self.slow - self.fast), start))
        # counted back from the target: the last `fast` frames, before them every stride-th frame, never the sink again
        motion = range(max(self.sink, start - self.fast), start)
        # the slow part begins at most slow * stride frames before the fast part
        first = max(self.sink, start - self.fast - self.slow * self.stride)
        slow = range(first, start - self.fast, self.stride)[-self.slow :] if self.slow else range(0)
        return [*range(min(self.sink, start)), *slow, *motion]

    def draw_context_frames(self, start: int, batch: int, rng: Noise) -> HeldFrames:
        """Draw which frames a teacher is shown in training; only with `context: memory` is there anything to draw.

        Each video draws how likely a chunk is to be news, then a coin for each chunk. So any number of promoted chunks, from none
        to all that are tested, is as likely as any other, whatever share the student will promote.
        """
        if self.context != "memory" or not start:
            return list_held_frames(self.context_frames(start))
        chances = draw_uniform((batch, 1 + start // self.chunk), rng)
        return self._imagine_frames(chances[:, 1:] < chances[:, :1], start)

    def _imagine_frames(self, news: Bool[Tensor, "B chunks"], start: int) -> HeldFrames:
        """Return the frames that a memory holds at `start`, if these chunks are news where it tests them."""
        if start % self.chunk:
            raise ValueError(f"a target begins at latent frame {start}, but the student's begin with a chunk of {self.chunk}")
        return find_held_frames(imagine_memory(self._build_memory_spec(), self.chunk, news))

    def _build_memory_spec(self) -> MemorySpec:
        """Return the settings of a memory of this layout, to which orthogonal keys are news and equal keys are not."""
        plain = build_plain_spec(self.sink, self.fast, "packed")
        return replace(plain, slow=self.slow, promote="similarity", tau=0.5, interval=self.stride // self.chunk)

    def read_context(
        self,
        model: Score,
        text: Float[Tensor, "B T E"],
        context: Float[Tensor, "B K C H W"],
        filled: Bool[Tensor, "B K"] | None = None,
    ) -> Memory | None:
        """Return the context's keys and values, valid at any noise level; None if each pass brings the context along, or there is none."""
        if self.context_pass == "joint" or not context.shape[1]:
            return None
        assert isinstance(model, ContextReader)
        return model.read_context(context, text, filled)

    def velocity(
        self,
        model: Score,
        x_t: Float[Tensor, "B F C H W"],
        sigma: Float[Tensor, " B"],
        text: Float[Tensor, "B T E"],
        context: Float[Tensor, "B K C H W"],
        past: Memory | None = None,
        filled: Bool[Tensor, "B K"] | None = None,
    ) -> Float[Tensor, "B F C H W"]:
        """Return v of the target after its clean context; time is 0, 1, 2, … over both, whatever was left out between them.

        `filled` says which context frames a video has (`HeldFrames`); nothing sees the others, and they take no time.

        joint: one bidirectional pass over both. own: over the target alone, which sees the context's keys and values, `past`;
        without `past` they are read here. Same prompt, same weights, same context: the answer is the same to the bit.
        """
        context_frames = context.shape[1]
        if not context_frames:
            return model.velocity(x_t, sigma, text)
        # own: the target's pass [B, F] looks at the context's keys and values, which know no noise level
        if self.context_pass == "own":
            assert isinstance(model, ContextReader)
            return model.velocity(x_t, sigma, text, self.read_context(model, text, context, filled) if past is None else past)
        # joint: [B, K + F, C, H, W] in one pass, of which only the target's part is wanted
        levels: Tensor = sigma
        if self.context_sigma == "zero":
            # [B, K + F]: σ = 0 for the context, the target's level for the target
            levels = torch.cat([sigma.new_zeros(len(sigma), context_frames), sigma[:, None].expand(-1, x_t.shape[1])], dim=1)
        both = torch.cat([context, x_t], dim=1)
        if filled is None:
            return model.velocity(both, levels, text)[:, context_frames:]
        assert isinstance(model, ContextReader)
        filled = torch.cat([filled, filled.new_ones(x_t.shape[:2])], dim=1)
        return model.velocity(both, levels, text, None, filled)[:, context_frames:]


def guide_velocity(
    model: Score,
    text: Float[Tensor, "B T E"],
    context: Float[Tensor, "B K C H W"],
    *,
    view: TeacherView,
    guidance: float,
    null: Float[Tensor, "T E"],
    passes: GuidancePasses,
    filled: Bool[Tensor, "B K"] | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return classifier-free guidance, v_null + guidance (v_cond - v_null), as a function of x_t and σ.

    A context with a pass of its own is read here, once for each prompt.
    """
    # guidance 1 is v_cond alone, so it needs no null prompt
    prompts = [text] if guidance == 1 else [text, null.expand_as(text)]
    if passes == "together":
        prompts = [torch.cat(prompts)]
    times = len(prompts[0]) // len(text)  # 2 where both prompts share a pass
    contexts, places = torch.cat([context] * times), None if filled is None else torch.cat([filled] * times)
    pasts = [view.read_context(model, prompt, contexts, places) for prompt in prompts]

    def velocity(x_t: Tensor, sigma: Tensor) -> Tensor:
        x_t, sigma = torch.cat([x_t] * times), torch.cat([sigma] * times)
        velocities = [view.velocity(model, x_t, sigma, prompt, contexts, past, places) for prompt, past in zip(prompts, pasts, strict=True)]
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
