"""Probes of the memory: recall of real clips, one denoising step at a time, and effective context, by changing a single fact.

No camera can confound recall, because all that is seen is real. The memory reads a real clip chunk by chunk. Before each chunk is read,
the student denoises it once from noise of a known level, with its memory and with a memory that never had a slow part. Where a landmark
stood neither in the sink nor in the fast part, the difference of the two errors is what the slow part is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from .denoiser import Denoiser
from .flow import BatchGenerator, Noise, add_noise, draw_gaussian
from .memory import MemorySpec, empty_memory
from .rollout import stream


@torch.no_grad()
def measure_one_step_errors(
    student: Denoiser,
    real: Float[Tensor, "B F C H W"],
    text: Float[Tensor, "B T E"],
    spec: MemorySpec,
    *,
    chunk: int,
    start: int,
    sigmas: Sequence[float],
    rng: Noise,
) -> dict[tuple[float, bool], Float[Tensor, "B K H W"]]:
    """Measure (x̂_0 - x)², mean over channels, of the latent frames from `start` on, K of them, each predicted in a single step.

    Keys are the noise level and whether the memory had its slow part; both have the same noise.
    """
    # The same clip is read twice, once without anything being promoted: at a tau of -1 nothing is news, and all positions stay.
    memories = {True: empty_memory(spec), False: empty_memory(replace(spec, promote="similarity", tau=-1.0) if spec.slow else spec)}
    errors: dict[tuple[float, bool], list[Tensor]] = {(sigma, slow): [] for sigma in sigmas for slow in memories}
    for first in range(0, real.shape[1] - chunk + 1, chunk):
        x = real[:, first : first + chunk]
        if first >= start:
            # [B, chunk, C, H, W] noised to each level; both memories are given the same x_t
            for sigma in sigmas:
                level = x.new_full((len(x),), sigma)
                x_t = add_noise(x, draw_gaussian(x.shape, rng), level)
                for slow, memory in memories.items():
                    errors[sigma, slow].append((student(x_t, level, text, memory) - x).square().mean(dim=2))
        memories = {slow: student.remember(x, text, memory) for slow, memory in memories.items()}
    return {key: torch.cat(parts, dim=1) for key, parts in errors.items()}


@torch.no_grad()
def measure_following(
    student: Denoiser,
    pairs: Float[Tensor, "2 N F C H W"],
    text: Float[Tensor, "N T E"],
    spec: MemorySpec,
    *,
    start: int,
    chunk: int,
    sigmas: list[float],
    seed: int,
) -> Float[Tensor, "2 N"]:
    """Measure whether what a student makes follows the fact of its own context: 0.5 is its own world, -0.5 the other one of its pair.

    The two clips of a pair differ in one fact. The student reads either up to latent frame `start` and goes on with the same noise; the
    result is projected on the difference of the two clips there. Where the fact is not remembered both results are the same, and the
    two numbers of the pair cancel.
    """
    count, size = pairs.shape[1], pairs.shape[3:]
    real, texts = pairs.flatten(0, 1), torch.cat([text, text])
    memory = student.remember_clip(real[:, :start], texts, spec, chunk=chunk)
    rng = BatchGenerator([(seed, n) for n in range(count)] * 2, real.device)  # both clips of a pair get the same noise
    chunks = stream(student, texts, (size[0], size[1], size[2]), sigmas=sigmas, chunk=chunk, memory=memory, rng=rng)
    made = torch.cat([next(chunks) for _ in range(start, real.shape[1], chunk)], dim=1).unflatten(0, (2, count))
    truth = pairs[:, :, start:]
    change = (truth - truth.flip(0)).flatten(2)  # from the other world to the own one
    middle = ((truth + truth.flip(0)) / 2).flatten(2)
    return ((made.flatten(2) - middle) * change).sum(dim=2) / change.square().sum(dim=2)
