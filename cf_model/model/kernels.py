"""Attention kernels by their names in params.yaml, and the fastest of those that are installed, found by measuring (`attention: auto`)."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from jaxtyping import Float
from torch import Tensor

NATIVE = "native"  # torch's own kernel
# params.yaml's names of attention kernels: diffusers' names, and the package that each needs
BACKENDS = {
    "native": (NATIVE, None),
    "cudnn": ("_native_cudnn", None),
    "flash2": ("flash", "flash_attn"),
    "flash3": ("_flash_3", "flash_attn_interface"),
}
WITHOUT_MASK = ("flash2", "flash3")  # kernels that attend to all keys or to none
log = logging.getLogger(__name__)


def attend(
    q: Float[Tensor, "B L N D"], k: Float[Tensor, "B K N D"], v: Float[Tensor, "B K N D"], mask: Tensor | None, backend: str
) -> Float[Tensor, "B L N D"]:
    """Attend by a kernel that diffusers knows by this name.

    Causality is in what the memory holds, and the frames of a chunk see each other; a mask hides places that are still empty.
    """
    if backend == NATIVE:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    from diffusers.models.attention_dispatch import dispatch_attention_fn  # here, so that reading params needs no diffusers

    return dispatch_attention_fn(q, k, v, attn_mask=mask, backend=backend)


@dataclass(frozen=True)
class AttentionShape:
    """What decides which kernel is fastest: a pass's shapes, type and device."""

    videos: int
    queries: int  # tokens of the pass
    keys: int  # tokens that it attends to
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


def list_kernels(shape: AttentionShape) -> list[str]:
    """List the kernels that are installed and can compute this shape; those without a mask only for a single video.

    Videos of a batch may remember different numbers of frames, which a mask must hide.
    """
    if shape.device.type != "cuda" or shape.dtype == torch.float32:
        return [NATIVE]  # all others exist for a GPU and half precision alone
    fits = [name for name in BACKENDS if shape.videos == 1 or name not in WITHOUT_MASK]
    return [name for name in fits if (package := BACKENDS[name][1]) is None or importlib.util.find_spec(package)]


def measure_kernel(name: str, shape: AttentionShape) -> float:
    """Return the seconds of one attention of this shape by a kernel, the median over a tenth of a second, on random numbers."""
    from torch.utils.benchmark import Timer  # here, because reading params needs none

    q, k = (
        torch.randn(shape.videos, tokens, shape.heads, shape.head_dim, dtype=shape.dtype, device=shape.device)
        for tokens in (shape.queries, shape.keys)
    )
    given = {"run": attend, "q": q, "k": k, "v": torch.randn_like(k), "backend": BACKENDS[name][0]}
    return float(Timer("run(q, k, v, None, backend)", globals=given).blocked_autorange(min_run_time=0.1).median)


def choose_kernel(shape: AttentionShape, measure: Callable[[str, AttentionShape], float] = measure_kernel) -> str:
    """Return the fastest kernel for a shape, and log what each took; a kernel that fails on this machine is left out.

    With a single candidate nothing is measured. torch's own kernel runs everywhere, so there is always one.
    """
    names, seconds = list_kernels(shape), dict[str, float]()
    if len(names) == 1:
        return names[0]
    # one after the other on the same machine; a median is hardly disturbed by what else runs there
    for name in names:
        try:
            seconds[name] = measure(name, shape)
        except (RuntimeError, ValueError, ImportError) as error:  # installed for another GPU, such as flash3 on a card before Hopper
            log.info("attention %s does not run here: %s", name, error)
    fastest = min(seconds, key=lambda name: seconds[name], default=NATIVE)
    listed = ", ".join(f"{name} {1000 * value:.3g} ms" for name, value in seconds.items())
    log.info("attention auto: %s for %d queries and %d keys of %d videos (%s)", fastest, shape.queries, shape.keys, shape.videos, listed)
    return fastest
