"""A few videos while a model trains: the same prompts and noise every time, so that one sees it learn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cf_model.model.denoiser import Denoiser
from cf_model.model.flow import Flow, falling, gaussian
from cf_model.model.memory import MemorySpec, empty
from cf_model.model.rollout import stream
from cf_model.model.view import TeacherView, sample

from .ode import trajectory


@dataclass(frozen=True)
class SampleSpec:
    every: int  # steps from one set of videos to the next; 0: none
    prompts: int  # of the first held-out clips, one video each
    frames: int  # latent frames of a video, a real beginning included
    seed: int  # of their noise
    crf: int  # of their files

    def __post_init__(self) -> None:
        if self.every < 0 or self.seed < 0 or min(self.prompts, self.frames) < 1:
            stated = f"every is {self.every}, prompts {self.prompts}, frames {self.frames}, seed {self.seed}"
            raise ValueError(f"{stated}; use 1 or more prompts and frames, a seed of 0 or more, and every: 0 for no samples")
        if not 0 <= self.crf <= 51:
            raise ValueError(f"crf is {self.crf}; use 0..51")

    def rng(self, number: int, device: torch.device) -> torch.Generator:
        """The noise of a prompt's video, its own: no random numbers of the training are used, and a resumed run draws the same."""
        return torch.Generator(device).manual_seed(100_003 * (self.seed + 1) + number)


@dataclass(frozen=True)
class WindowSpec(SampleSpec):
    """Of a bidirectional model: one window from noise."""

    sampler_steps: int
    guidance: float  # null + guidance (cond - null)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler_steps < 1 or self.guidance < 1:
            raise ValueError(f"sampler_steps is {self.sampler_steps} and guidance {self.guidance}; use 1 or more")


@dataclass(frozen=True)
class ContinuedSpec(WindowSpec):
    """Of the teacher: the window after a held-out clip's beginning."""

    prefix: int  # latent frames of it

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.prefix < self.frames:
            raise ValueError(f"prefix is {self.prefix} of {self.frames} frames; use 1 or more, and fewer than frames")


@dataclass(frozen=True)
class LevelsSpec(SampleSpec):
    """Of the causal initialisation, which is trained at all noise levels and has none of its own."""

    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        falling(self.levels)


@dataclass(frozen=True)
class SamplesSpec:
    """Of each training stage."""

    base: WindowSpec
    teacher: ContinuedSpec
    causal_init: LevelsSpec
    stage1: SampleSpec
    stage2: SampleSpec


def from_noise(
    model: Denoiser,
    text: Float[Tensor, "1 T E"],
    real: Float[Tensor, "1 0 C H W"],
    rng: torch.Generator,
    *,
    spec: WindowSpec,
    flow: Flow,
    null: Float[Tensor, "T E"],
) -> Iterator[Float[Tensor, "1 F C H W"]]:
    """A window of the base model, which knows no past."""
    noise, levels = gaussian((1, spec.frames, *real.shape[2:]), rng), flow.levels(spec.sampler_steps)
    *_, x_0 = trajectory(model, text, noise, levels=levels, guidance=spec.guidance, null=null)
    yield x_0


def continued(
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
    """A real beginning, and the teacher's window after it."""
    yield real
    seen, shape = real[:, view.frames(spec.prefix)], (spec.frames - spec.prefix, *real.shape[2:])
    null = null.to(text)
    given = {"steps": spec.sampler_steps, "guidance": spec.guidance}
    yield sample(model, text, seen, shape, view=view, flow=flow, **given, guidance_passes="apart", rng=rng, null=null)  # type: ignore[arg-type]


def streamed(
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
    """Chunk after chunk, as a causal model makes videos for people."""
    _, _, *size = real.shape
    shape = (size[0], size[1], size[2])
    chunks = stream(model, text, shape, sigmas=flow.sigmas(levels), chunk=chunk, memory=empty(memory), rng=rng)
    for _ in range(spec.frames // chunk):
        yield next(chunks)
