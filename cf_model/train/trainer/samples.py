"""Sample videos of a model in training: the same prompts and noise every time, so that the videos show what it has learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cf_model.model.denoiser import Denoiser
from cf_model.model.flow import BatchGenerator, Flow, check_levels_fall, draw_gaussian
from cf_model.model.memory import MemorySpec, empty_memory
from cf_model.model.rollout import stream
from cf_model.model.view import TeacherView, sample_window

from .ode import trace_ode


@dataclass(frozen=True)
class SampleSpec:
    """How often and how many videos are sampled. Enough for stages 1 and 2, whose models state their own noise levels."""

    every: int  # steps from one set of videos to the next; 0: none
    prompts: int  # of the first held-out clips, one video each
    frames: int  # latent frames of a video, its real beginning included
    seed: int  # of their noise
    crf: int  # of their files

    def __post_init__(self) -> None:
        if self.every < 0 or self.seed < 0 or min(self.prompts, self.frames) < 1:
            problem = f"every is {self.every}, prompts {self.prompts}, frames {self.frames}, seed {self.seed}"
            raise ValueError(f"{problem}; use 1 or more prompts and frames, a seed of 0 or more, and every: 0 for no samples")
        if not 0 <= self.crf <= 51:
            raise ValueError(f"crf is {self.crf}; use 0..51")

    def rng(self, number: int, device: torch.device) -> BatchGenerator:
        """Return the noise of prompt `number`'s video: apart from the training's random numbers, and the same in a resumed run."""
        return BatchGenerator([(self.seed, number)], device)


@dataclass(frozen=True)
class WindowSpec(SampleSpec):
    """Samples of a bidirectional model: one window from noise."""

    sampler_steps: int
    guidance: float  # null + guidance (cond - null)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler_steps < 1 or self.guidance < 1:
            raise ValueError(f"sampler_steps is {self.sampler_steps} and guidance {self.guidance}; use 1 or more")


@dataclass(frozen=True)
class ContinuedSpec(WindowSpec):
    """Samples of the teacher: the window after the beginning of a held-out clip."""

    prefix: int  # latent frames of the real beginning

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.prefix < self.frames:
            raise ValueError(f"prefix is {self.prefix} of {self.frames} frames; use 1 or more, and fewer than frames")


@dataclass(frozen=True)
class LevelsSpec(SampleSpec):
    """Samples of the causal initialisation, which is trained at all noise levels and so needs the sampler's stated."""

    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_levels_fall(self.levels)


@dataclass(frozen=True)
class SamplesSpec:
    """Sample settings of each training stage."""

    base: WindowSpec
    teacher: ContinuedSpec
    causal_init: LevelsSpec
    stage1: SampleSpec
    stage2: SampleSpec


def sample_from_noise(
    model: Denoiser,
    text: Float[Tensor, "1 T E"],
    real: Float[Tensor, "1 0 C H W"],
    rng: torch.Generator,
    *,
    spec: WindowSpec,
    flow: Flow,
    null: Float[Tensor, "T E"],
) -> Iterator[Float[Tensor, "1 F C H W"]]:
    """Yield one window of the base model, which sees no past; `real` gives C, H, W only."""
    # A full sampler, as at inference: x_0 is the last state of the ODE.
    noise, levels = draw_gaussian((1, spec.frames, *real.shape[2:]), rng), flow.sampler_sigmas(spec.sampler_steps)
    *_, x_0 = trace_ode(model, text, noise, levels=levels, guidance=spec.guidance, null=null)
    yield x_0


def sample_continuation(
    model: Denoiser,
    text: Float[Tensor, "1 T E"],
    real: Float[Tensor, "1 K C H W"],
    rng: torch.Generator,
    *,
    spec: ContinuedSpec,
    view: TeacherView,
    flow: Flow,
    null: Float[Tensor, "T E"],
) -> Iterator[Float[Tensor, "1 _ C H W"]]:
    """Yield a real beginning, then the teacher's window after it."""
    # The beginning is shown too, so that a viewer sees where the teacher takes over.
    yield real
    # The teacher sees what its view cuts out of the real beginning.
    context, shape = real[:, view.context_frames(spec.prefix)], (spec.frames - spec.prefix, *real.shape[2:])
    yield sample_window(
        model,
        text,
        context,
        shape,
        view=view,
        flow=flow,
        steps=spec.sampler_steps,
        guidance=spec.guidance,
        guidance_passes="apart",  # one pass after the other, which takes the least memory beside a training
        rng=rng,
        null=null.to(text),
    )


def sample_stream(
    model: Denoiser,
    text: Float[Tensor, "1 T E"],
    real: Float[Tensor, "1 0 C H W"],
    rng: torch.Generator,
    *,
    spec: SampleSpec,
    levels: Sequence[float],
    chunk: int,
    memory: MemorySpec,
    flow: Flow,
) -> Iterator[Float[Tensor, "1 _ C H W"]]:
    """Yield chunk after chunk of a causal model, as at inference; `real` gives C, H, W only."""
    # The memory begins empty and grows with the video, as for a user's prompt: the student gets no real frame.
    _, _, *size = real.shape
    shape = (size[0], size[1], size[2])
    chunks = stream(model, text, shape, sigmas=flow.shift_levels(levels), chunk=chunk, memory=empty_memory(memory), rng=rng)
    for _ in range(spec.frames // chunk):
        yield next(chunks)
