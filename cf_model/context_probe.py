"""Rows of the two probes of the memory (model/recall.py): one-step errors on real clips, and effective context by intervention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .codec.interface import Codec, video_frames
from .data.interventions import FactPair, find_pairs, render_pairs
from .data.worlds import WorldSpec
from .model.denoiser import Denoiser
from .model.memory import MemorySpec
from .model.recall import measure_following, measure_one_step_errors
from .text.encoder import TextEncoder

FACTS = 500_000  # of the million seeds of worlds that a seed of a run has, the first of those that clips are not rendered from


def list_errors(
    student: Denoiser,
    real: Float[Tensor, "B F C H W"],
    text: Float[Tensor, "B T E"],
    memory: MemorySpec,
    names: Sequence[str],
    *,
    chunk: int,
    start: int,
    **noise: Any,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each noise level, memory and clip: `error` by latent frame, row and column, to five places; `names` of the clips.

    `chunk` and `start` are in latent frames; `noise` is sigmas and rng (`measure_one_step_errors`).
    """
    for (sigma, slow), errors in measure_one_step_errors(student, real, text, memory, chunk=chunk, start=start, **noise).items():
        about = {"sigma": sigma, "slow": slow, "start": start, "chunk": chunk, "sink": memory.sink, "fast": memory.fast}
        for name, error in zip(names, errors.cpu(), strict=True):
            rounded = [[[round(value, 5) for value in line] for line in frame] for frame in error.tolist()]
            yield about | {"clip": name, "error": rounded}


def choose_pairs(
    lags: Sequence[float], count: int, spec: WorldSpec, *, seed: int, sink: int, start: int, stop: int, fps: float
) -> list[FactPair]:
    """Choose `count` pairs of worlds for each lag; `sink`, `start` and `stop` are in latent frames, `seed` is the run's."""
    ends = {"sink": video_frames(sink), "start": video_frames(start), "stop": video_frames(stop)}
    return [pair for lag in lags for pair in find_pairs(lag, count, spec, seed=seed * 1_000_000 + FACTS, fps=fps, **ends)]


def follow_facts(
    student: Denoiser,
    memory: MemorySpec,
    pairs: Sequence[FactPair],
    codec: Codec,
    text: TextEncoder,
    *,
    start: int,
    stop: int,
    batch: int,
    video: Mapping[str, Any],
    device: torch.device,
    **rollout: Any,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each pair: its lag, and `follows` of its two worlds (`measure_following`), which is above 0 where it is followed.

    `start` and `stop` are in latent frames, `batch` in pairs; `video` is height, width and fps; `rollout` is chunk, sigmas and seed.
    """
    for some in (pairs[first : first + batch] for first in range(0, len(pairs), batch)):
        videos = torch.from_numpy(render_pairs(some, video_frames(stop), **video))
        real = codec.encode(videos.flatten(0, 1)).to(device).unflatten(0, (2, len(some)))
        prompts = text.encode([pair.first.caption for pair in some]).to(device)
        follows = measure_following(student, real, prompts, memory, start=start, **rollout).T.tolist()
        for pair, sides in zip(some, follows, strict=True):
            yield {"lag": pair.lag, "world": pair.first.seed, "away": round(pair.away, 2), "follows": sides}
