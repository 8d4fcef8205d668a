"""Contexts in latent frames: which frames of a video its memory holds, so that teacher and critic are shown the same (fig. 3).

A memory holds keys and values of a student; a score has its own weights, so it reads the same frames of the video itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .key_values import Frames, KeyValues
from .memory import ContextMemory, Memory, MemorySpec, empty_memory
from .slow_part import SlowPart


@dataclass(frozen=True, eq=False)
class HeldFrames:
    """Numbers of the latent frames that a context shows of each video of a batch, in the order of time."""

    numbers: Int[Tensor, "B K"]  # B is 1 where they are the same for every video
    filled: Bool[Tensor, "B K"] | None  # places that show a frame, since videos promote different numbers of frames; None: all

    def cut(self, video: Float[Tensor, "B F C H W"]) -> Float[Tensor, "B K C H W"]:
        """Return these frames of the videos; what stands in a place that is not filled means nothing."""
        videos = torch.arange(len(video), device=video.device)[:, None]
        return video[videos, self.numbers.to(video.device)]

    @property
    def mean_count(self) -> Float[Tensor, ""]:
        """Return how many frames are shown, as a mean over the videos, for the log."""
        return torch.tensor(float(self.numbers.shape[1])) if self.filled is None else self.filled.sum(dim=1).double().mean()


def list_held_frames(numbers: list[int]) -> HeldFrames:
    """Return a context of the same frames of every video."""
    return HeldFrames(torch.tensor([numbers], dtype=torch.long), None)


def find_held_frames(memory: Memory) -> HeldFrames:
    """Return which frames a memory holds: its sink, what each video has promoted, and its fast part. Nothing is read by the host.

    `# Choice:` with scope layer the layers hold different frames, and a score is shown those that more than half of the layers hold.
    """
    groups = range(memory.groups)
    numbers, filled = [memory.number_frames(group) for group in groups], [memory.mask_empty(group) for group in groups]
    if not isinstance(numbers[0], Tensor):
        return list_held_frames(sorted({number for group in numbers for number in group}))
    # One vote a group for each frame that it holds, [B, frames of the video]; a frame of two parts (when: enqueue) is shown once.
    at = torch.stack([torch.as_tensor(group) for group in numbers], dim=1)  # [B, G, K]
    held = torch.stack([mask for mask in filled if mask is not None], dim=1).long()
    votes = at.new_zeros(*at.shape[:2], memory.frame_count).scatter_add(2, at, held).clamp(max=1).sum(dim=1)
    chosen = torch.where(2 * votes > len(groups), torch.arange(memory.frame_count, device=at.device), -1)
    # The newest, as many as there are places; the number of places depends on the chunks' number alone, never on what is promoted.
    newest = chosen.topk(min(memory.places, memory.frame_count)).values.flip(1)
    return HeldFrames(newest.clamp(min=0), newest >= 0)


def imagine_memory(spec: MemorySpec, chunk: int, news: Bool[Tensor, "B chunks"]) -> ContextMemory:
    """Return the memory of videos whose n-th chunk is news where `news[:, n]` says so, by the policy that a student's memory follows.

    Its keys have two channels: a chunk that is news is orthogonal to the chunk before it, any other equals it.
    """
    memory = empty_memory(spec)
    sides = torch.eye(2, device=news.device)[news.long().cumsum(dim=1) % 2]  # [B, chunks, 2]
    for number in range(news.shape[1]):
        key = (sides[:, number, None, None],)  # of one layer and one token: [B, 1, 1, 2]
        memory = memory.remember(tuple(KeyValues(number * chunk + frame, key, key) for frame in range(chunk)))
    return memory


def build_plain_spec(sink: int, fast: int, positions: Literal["packed", "absolute"]) -> MemorySpec:
    """Return a memory of the first `sink` and the newest `fast` frames that never promotes."""
    return MemorySpec(
        sink=sink,
        slow=0,
        fast=fast,
        promote="none",
        tau=1.0,
        similarity="raw",
        interval=1,
        begin=1,
        keep="first",
        when="evict",
        timing="clean",
        fill="none",
        scope="global",
        positions=positions,
        commit="all",
    )


def fixed_memory(frames: Frames, filled: Bool[Tensor, "B K"] | None = None) -> ContextMemory:
    """Return a memory of exactly these frames, at positions 0, 1, 2, …, that never promotes: a context read in one pass.

    `filled` says which of the frames each video has; their positions leave out the others.
    """
    memory = ContextMemory(build_plain_spec(0, len(frames), "packed"), SlowPart(0), frame_count=len(frames))
    if filled is None:
        return replace(memory, fast=frames)
    # The slow part knows how to hold different frames of every video: a video's own first, in the order of time.
    order = (~filled).long().argsort(dim=1, stable=True)[:, None]  # [B, 1, K]
    return replace(memory, slow=SlowPart(len(frames), frames, order, order, filled.sum(dim=1, keepdim=True)))
