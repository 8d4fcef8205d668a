"""Trajectories of the base model from noise to video, on which a causal student regresses (CausVid, Self-Forcing: ODE initialisation)."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cf_model.model.denoiser import Denoiser
from cf_model.model.flow import BatchGenerator, Flow, draw_gaussian
from cf_model.model.weights import check_safetensors_header
from cf_model.train.trainer.batch import PromptSet
from cf_model.train.trainer.engine import require_at_least
from cf_model.train.trainer.loop import TrainingLog
from cf_model.train.trainer.ode import trace_ode
from cf_model.train.trainer.ranks import count_ranks, get_rank


@dataclass(frozen=True)
class OdeSpec:
    """How the base model's trajectories are computed and stored. Self-Forcing: 16,000 videos, 48 steps, shift 8, guidance 6."""

    videos: int
    batch: int  # videos computed together, and lost together when the stage is killed
    steps: int
    keep: tuple[int, ...]  # steps before which the noisy state is stored; x_0 always is
    shift: float
    guidance: float  # null + guidance (cond - null)
    context: Literal["noisy", "clean"]  # what a chunk sees of the chunks before it: their drawn states, or their x_0

    def __post_init__(self) -> None:
        require_at_least(1, videos=self.videos, batch=self.batch, steps=self.steps, shift=self.shift, guidance=self.guidance)
        if not self.keep or list(self.keep) != sorted({*self.keep}) or self.keep[0] < 0 or self.keep[-1] >= self.steps:
            raise ValueError(f"keep is {list(self.keep)}; name steps in rising order, from 0 to {self.steps - 1}: the end is kept anyway")

    def levels(self, flow: Flow) -> list[float]:
        """Return σ before every step, and 0 at the end."""
        return replace(flow, shift=self.shift).sampler_sigmas(self.steps)


class OdeTrajectories:
    """Stored trajectories: computed once, a file for each batch, then read at random. A video's noise depends on its number alone."""

    def __init__(
        self,
        folder: Path,
        spec: OdeSpec,
        *,
        prompts: PromptSet,
        shape: tuple[int, int, int, int],
        flow: Flow,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        """`shape` is F, C, H, W of a video: a trajectory begins with noise, so prompts are all that it needs of the data."""
        self.folder, self.spec, self.prompts, self.shape, self.dtype, self.seed = folder, spec, prompts, shape, dtype, seed
        self.path = spec.levels(flow)
        self.sigmas = [self.path[step] for step in (*spec.keep, spec.steps)]  # of the K stored states; the last is 0

    def compute(self, model: Denoiser, null: Float[Tensor, "T E"], log: TrainingLog) -> None:
        """Compute the files that are missing: a file gets its name when it is complete, so a killed stage goes on where it was."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Rank r computes the files r, r + R, r + 2R, … of R ranks.
        firsts = range(0, self.spec.videos, self.spec.batch)[get_rank() :: count_ranks()]  # `fit` begins by waiting for all ranks
        missing = [first for first in firsts if not _is_complete(self._find_file(first))]
        total, to_compute = (sum(len(self._list_videos(first)) for first in part) for part in (firsts, missing))
        bar = log.progress(total, "video", total - to_compute)
        for first in missing:
            videos = self._list_videos(first)
            # [B, F, C, H, W], each video's from a stream of its own.
            streams = BatchGenerator([(self.seed, video) for video in videos], next(model.parameters()).device)
            noise = draw_gaussian((len(videos), *self.shape), streams)
            # All states of the sampler are computed, and those before the steps in `keep` are stored, with x_0: K of them.
            states = trace_ode(model, self.text(videos), noise, levels=self.path, guidance=self.spec.guidance, null=null)
            stored = [x.to("cpu", self.dtype) for step, x in enumerate(states) if step in (*self.spec.keep, self.spec.steps)]
            _write_states(self._find_file(first), torch.stack(stored, dim=1))  # [B, K, F, C, H, W]
            bar.update(len(videos))
        bar.close()

    def read(self, videos: list[int]) -> Float[Tensor, "B K F C H W"]:
        """Read the K stored states of these videos, the noisiest first and x_0 last."""
        # Of a file only this video's slice is read: [K, F, C, H, W].
        parts = []
        for video in videos:
            first = video - video % self.spec.batch
            with safe_open(self._find_file(first), framework="pt") as file:
                parts.append(file.get_slice("states")[video - first])
        return torch.stack(parts).float()

    def text(self, videos: list[int]) -> Float[Tensor, "B T E"]:
        """Return the prompts of these videos: the students' prompts in turn, repeated as often as needed."""
        return self.prompts[[video % len(self.prompts) for video in videos]]

    def _list_videos(self, first: int) -> list[int]:
        """Return the numbers of the videos in the file that begins with video `first`."""
        return list(range(first, min(first + self.spec.batch, self.spec.videos)))

    def _find_file(self, first: int) -> Path:
        """Return the path of that file."""
        return self.folder / f"{first:08d}.safetensors"


def _is_complete(file: Path) -> bool:
    """Tell whether a file is there and complete: a killed process leaves no half-written file, but a machine that lost power can."""
    try:
        check_safetensors_header(file)
    except ValueError:
        return False
    return True


def _write_states(path: Path, states: Tensor) -> None:
    """Write a file under a temporary name and rename it once its bytes are on the disk."""
    # Without fsync the name could reach the disk before the bytes, and a machine that loses power would leave a torn file.
    partial = path.with_suffix(".partial")
    save_file({"states": states.contiguous()}, partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.rename(path)
