"""Latents of videos by any of the compared systems: chunk after chunk with a memory, or window after window with a view of the past."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .data.latents import Latents
from .data.prompts import read_prompts
from .model.denoiser import Denoiser
from .model.flow import Noise
from .model.memory import Memory, MemorySpec, empty_memory
from .model.rollout import denoise_chunk
from .model.view import TeacherView, sample_window

Size = tuple[int, int, int]  # channels, height and width of a latent frame


@dataclass(frozen=True)
class VideoJob:
    """Video to be made: `real` is the clip that it continues or, without a system, the clip that it shows."""

    suite: str
    name: str
    system: Any  # of generate.systems or .continuations in params.yaml, or None
    number: int
    seed: int
    prompt: str
    clip: str | None
    real: Tensor | None  # [1, F, C, H, W]

    @property
    def file(self) -> str:
        """The video's path below the stage's out."""
        return f"{self.suite}/{self.name}/{self.number:05d}-s{self.seed}.mp4"


def list_jobs(g: Any, clips: Latents) -> Iterator[VideoJob]:
    """Yield the videos in the order of the systems, so that one model is in memory at a time. `g`: section `generate` of params.yaml."""
    heldout = clips.rows("heldout")
    captions: list[tuple[str, int | None]] = [(clips.captions([row])[0], row) for row in heldout[: g.prompts]]
    if g.prompts_file:
        captions = [(prompt, None) for prompt in read_prompts(g.prompts_file, g.prompts)]
    for suite, count, frames in (("prompts", g.prompts, g.frames), ("continuations", g.continued, g.frames)):
        for number, clip in enumerate(heldout[:count]):
            real = clips.window([clip], [0], min(clips.frames(clip), frames))
            yield VideoJob(suite, "real", None, number, g.seeds[0], clips.captions([clip])[0], clips.clips[clip]["id"], real)
    for name, system in g.systems.items():
        for number, (prompt, row) in enumerate(captions):
            for seed in g.seeds:
                yield VideoJob("prompts", name, system, number, seed, prompt, None if row is None else clips.clips[row]["id"], None)
    for name, system in g.continuations.items():
        for number, clip in enumerate(heldout[: g.count_continued(name)]):
            prefix = clips.window([clip], [0], g.prefix)
            yield VideoJob("continuations", name, system, number, g.seeds[0], clips.captions([clip])[0], clips.clips[clip]["id"], prefix)


def group_jobs(todo: list[VideoJob], batch: int) -> Iterator[list[VideoJob]]:
    """Yield the videos of one system, at most `batch` at once; real clips, whose lengths differ, each by itself."""
    for _, group in groupby(todo, key=lambda job: (job.suite, job.name, None if job.system else job.number)):
        jobs = list(group)
        yield from (jobs[first : first + batch] for first in range(0, len(jobs), batch))


def generate_chunks(
    student: Denoiser,
    text: Float[Tensor, "B T E"],
    spec: MemorySpec,
    *,
    sigmas: list[float],
    chunk: int,
    merged: bool,
    frames: int,
    size: Size,
    rng: Noise,
    real: Float[Tensor, "B P C H W"] | None,
    held: Sequence[list[dict[str, Any]]],
) -> Iterator[Float[Tensor, "B F C H W"]]:
    """Yield a causal system's chunks after `real`, up to `frames` latent frames in all.

    Add to `held`, of each video, what the memory held when it began each chunk. `merged`: a chunk's clean pass and the next chunk's first
    one are one, where the memory looks at clean keys.
    """
    memory = empty_memory(spec) if real is None else student.remember_clip(real, text, spec, chunk=chunk)
    finished: Tensor | None = None  # a chunk that the next one's first pass remembers
    for _ in range((frames - memory.frame_count) // chunk):
        with torch.no_grad():  # alg. 1 with r' = T for every chunk, and the clean pass of line 21
            seen = memory
            x_0, (_, last), memory = denoise_chunk(student, text, size, sigmas, chunk, memory, rng, finished)
            note_memory(seen if finished is None else last, chunk, held)
            memory, finished = (memory, x_0) if merged and spec.timing == "clean" else (student.remember(x_0, text, memory), None)
        yield x_0


def note_memory(memory: Memory, chunk: int, held: Sequence[list[dict[str, Any]]]) -> None:
    """Add to `held`, of each video, the latent frames in each part of its memory, and those of the chunk that is begun."""
    now = list(range(memory.frame_count, memory.frame_count + chunk))
    for video, rows in enumerate(held):
        rows.append(memory.frame_indices(video) | {"now": now})


def generate_windows(
    model: Denoiser,
    text: Float[Tensor, "B T E"],
    null: Float[Tensor, "T E"],
    view: TeacherView,
    *,
    length: int,
    frames: int,
    size: Size,
    rng: Noise,
    real: Float[Tensor, "B P C H W"] | None,
    **sampler: Any,
) -> Iterator[Float[Tensor, "B F C H W"]]:
    """Yield a bidirectional system's windows of `length` latent frames after `real`, up to `frames` in all, each seen through the view.

    `sampler` is flow, steps, guidance and guidance_passes.
    """
    past = text.new_zeros(len(text), 0, *size) if real is None else real
    while (start := past.shape[1]) < frames:
        shape = (min(length, frames - start), *size)
        window = sample_window(model, text, past[:, view.context_frames(start)], shape, view=view, rng=rng, null=null, **sampler)
        yield window
        past = torch.cat([past, window], dim=1)
