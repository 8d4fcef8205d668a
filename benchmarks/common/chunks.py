"""Chunks of a causal student at the sizes of the comparison: ours, the usual cache's, and the floor of the same shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.usual_cache import UsualStudent
from cf_model.model import wan
from cf_model.model.block import OneDnnLinear
from cf_model.model.denoiser import Denoiser
from cf_model.model.memory import Memory, MemorySpec, empty_memory
from cf_model.model.rollout import stream
from cf_model.model.sizes import ModelSpec

SIGMAS = [1.0, 0.9375, 0.8333, 0.625]  # four levels after Wan's shift of 5


@dataclass(frozen=True)
class Sizes:
    """Sizes of model, latent and prompt."""

    model: ModelSpec
    channels: int = 16
    side: int = 16  # of a latent: 64 tokens
    text_tokens: int = 512
    text_channels: int = 256
    chunk: int = 3

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent frame."""
        return self.channels, self.side, self.side

    @property
    def tokens(self) -> int:
        """Tokens of a latent frame."""
        return self.side * self.side // 4


# the sizes of the comparison: dim 256, 8 layers, 64 tokens a latent, 9 million parameters
SMALL = Sizes(ModelSpec(layers=8, heads=4, head_dim=64, ffn=1024, freq=256, positions=1024))


def build_model(sizes: Sizes) -> Denoiser:
    """Build a model with random weights and a head that is not 0, because with a head of 0 nothing comes out."""
    model = wan.build_transformer(sizes.model, channels=sizes.channels, text_channels=sizes.text_channels, seed=0)
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return model.eval().freeze()


def build_onednn_models(sizes: Sizes) -> tuple[Denoiser, Denoiser]:
    """Build two models all of whose blocks' products oneDNN computes: ours, and one for the usual cache.

    The usual cache has its feed-forward's first product by oneDNN too, without the activation in it.
    """
    ours, usual = (build_model(sizes).multiply_by_onednn() for _ in range(2))
    for block in usual.transformer.blocks:
        block.ffn.net[0].proj.__class__ = OneDnnLinear
    return ours, usual


def draw_text(sizes: Sizes, batch: int = 1) -> Tensor:
    """Draw a prompt's vectors."""
    return torch.randn(batch, sizes.text_tokens, sizes.text_channels, generator=torch.Generator().manual_seed(1))


def run_ours(
    model: Denoiser, sizes: Sizes, spec: MemorySpec, *, batch: int = 1, chunks_before: int = 0, merged: bool = False
) -> Callable[[int], None]:
    """Return a function that makes the next n chunks as `cf video` does, of a video whose memory is full, or so many chunks long."""
    text, memory = draw_text(sizes, batch), fill_memory(model, sizes, spec, batch, chunks_before)
    rng = torch.Generator().manual_seed(2)
    chunks = stream(model, text, sizes.shape, sigmas=SIGMAS, chunk=sizes.chunk, memory=memory, rng=rng, merged=merged)

    def make(count: int) -> None:
        for _ in range(count):
            next(chunks)

    return make


def fill_memory(model: Denoiser, sizes: Sizes, spec: MemorySpec, batch: int = 1, chunks_before: int = 0) -> Memory:
    """Pass clean chunks of random numbers until the memory is full, or so many of them."""
    text, memory = draw_text(sizes, batch), empty_memory(spec)
    rng = torch.Generator().manual_seed(3)
    full = chunks_before or count_filling_chunks(spec, sizes.chunk)
    with torch.no_grad():
        for _ in range(full):
            memory = model.remember(torch.randn(batch, sizes.chunk, *sizes.shape, generator=rng), text, memory)
    return memory


def count_filling_chunks(spec: MemorySpec, chunk: int) -> int:
    """Count the chunks after which every part of the memory is full if every tested chunk is news."""
    per_test = 1 if spec.keep == "first" else chunk
    return (spec.sink + spec.fast) // chunk + spec.begin + spec.interval * -(-spec.slow // per_test) + 1


def run_usual(model: Denoiser, sizes: Sizes, *, sink: int, window: int, batch: int = 1) -> Callable[[int], None]:
    """Return a function that makes the next n chunks with the usual cache, of a video whose window is full."""
    student, text, rng, first = UsualStudent(model, sink=sink, window=window), draw_text(sizes, batch), torch.Generator().manual_seed(2), 0

    def draw() -> Tensor:
        return torch.randn(batch, sizes.chunk, *sizes.shape, generator=rng)

    @torch.no_grad()
    def make(count: int) -> None:
        nonlocal first
        for _ in range(count):
            student.make_chunk([draw() for _ in SIGMAS], SIGMAS, text, first)
            first += sizes.chunk

    with torch.no_grad():
        while first < window:
            student.run_pass(draw(), 0.0, text, first)
            first += sizes.chunk
    return make


def run_floor(sizes: Sizes, *, attended: int, batch: int = 1) -> Callable[[int], None]:
    """Return a function that runs the matrix products and attentions of n chunks and nothing else, on random numbers.

    The prompt's keys and values are not among them, because they need to be computed once a video.
    """
    m, dim = sizes.model, sizes.model.heads * sizes.model.head_dim
    queries = sizes.chunk * sizes.tokens

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))

    x, wide = normal(batch * queries, dim), normal(batch * queries, m.ffn)
    square, up, down = (normal(dim), normal(dim, dim)), (normal(m.ffn), normal(dim, m.ffn)), (normal(dim), normal(m.ffn, dim))
    q = normal(batch, m.heads, queries, m.head_dim)
    k, v = (normal(batch, m.heads, attended * sizes.tokens, m.head_dim) for _ in range(2))
    text = normal(batch, m.heads, sizes.text_tokens, m.head_dim)

    def make(count: int) -> None:
        for _ in range(count * (len(SIGMAS) + 1) * m.layers):
            for _ in range(6):  # queries, keys, values and output of one attention, queries and output of the other
                torch.addmm(square[0], x, square[1])
            F.scaled_dot_product_attention(q, k, v)
            F.scaled_dot_product_attention(q, text, text)
            torch.addmm(up[0], x, up[1])
            torch.addmm(down[0], wide, down[1])

    return make


def repeat(make: Callable[[int], None], count: int) -> Callable[[], None]:
    """Return a function that makes `count` chunks."""
    return lambda: make(count)


def each_window(sizes: Sizes) -> Iterator[int]:
    """Yield the windows of the comparison, in latent frames."""
    yield from range(2 * sizes.chunk, 22, sizes.chunk)
