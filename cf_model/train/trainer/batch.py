"""Draw what a batch is made of: the rows of encoded clips, and prompts of which a share is dropped for guidance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from cf_model.model.flow import draw_uniform

from .ranks import BatchRandom


class EncodedClips(Protocol):
    """The training clips as latents and prompt embeddings (cf_model/data/latents.py implements it). A clip is named by its row."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W of a latent frame."""

    def rows(self, split: Literal["train", "heldout"], at_least: int = 1) -> list[int]:
        """Return the clips of a split with at least so many latent frames. Raises ValueError where there are none."""

    def frames(self, row: int) -> int:
        """Return a clip's number of latent frames."""

    def window(self, rows: list[int], starts: list[int], length: int) -> Tensor:
        """Return `length` latent frames of each clip from its start on: [B, F, C, H, W] float32."""

    def text(self, rows: list[int]) -> Tensor:
        """Return the clips' prompt embeddings: [B, T, E] float32."""

    @property
    def empty_text(self) -> Tensor:
        """The empty prompt's embedding, [T, E]."""


class PromptSet(Protocol):
    """Embedded prompts, read as they are drawn because a training set's do not fit into memory. A tensor [P, T, E] satisfies it too."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: list[int], /) -> Tensor: ...


Value = TypeVar("Value", float, Tensor, float | Tensor)


def average_groups(values: Sequence[Value]) -> Value:
    """Average a value over the groups of a batch, which have equal sizes."""
    # The sum begins with the first value, which may be a tensor: 0 + tensor would cost a kernel for nothing.
    return sum(values[1:], start=values[0]) / len(values)


def draw_rows(rows: Iterable[int], count: int, rng: BatchRandom) -> list[int]:
    """Draw `count` of the rows with replacement: those of the whole batch, the same on every rank."""
    # Choice: with replacement, so that a step's batch follows from the step alone and a resumed run needs no record of an epoch.
    rows = list(rows)
    return [rows[i] for i in rng.integers(0, len(rows) - 1, count)]


def drop_prompts(text: Float[Tensor, "B T E"], empty: Float[Tensor, "T E"], share: float, rng: BatchRandom) -> Float[Tensor, "B T E"]:
    """Replace a share of the prompts by the empty prompt, so that the model learns the unconditional velocity that guidance needs."""
    # One draw for each sample of the whole batch, of which this group takes its rows: [B].
    keep = draw_uniform((len(text),), rng.rng) >= share
    return torch.where(keep[:, None, None], text, empty.to(text))
