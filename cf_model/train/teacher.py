"""The context teacher: the base model learns to continue a long past, by error-recycling fine-tuning (ERFT, sec. 3.4)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from cf_model.model.denoiser import Denoiser
from cf_model.model.flow import Flow, own_rows
from cf_model.model.view import TeacherView
from cf_model.train.trainer.batch import EncodedClips, average_groups, draw_rows, drop_prompts
from cf_model.train.trainer.ema import EMA
from cf_model.train.trainer.engine import PLAIN, EngineSpec, OptimizerSpec, require_at_least
from cf_model.train.trainer.observe import StepTimer
from cf_model.train.trainer.ranks import BatchRandom
from cf_model.train.trainer.zero import build_optimizer

from .adapter import LoraSpec, attach_lora
from .erft import BatchResiduals, ErrorBank, ErrorSpec, compute_erft_loss


@dataclass(frozen=True)
class TeacherSpec:
    """Settings of the stage `teacher`. The paper: 8,000 steps, batch 8 (sec. 4)."""

    steps: int
    batch: int
    target: int  # latent frames that the teacher generates
    shortest: int  # latent frames from the clip's beginning to the target, at least
    longest: int  # and at most
    no_context: float  # share of the steps without a past, so that it can also begin a video
    fast_only: float  # share of the steps that see the fast frames alone, so that an ablation without sink and slow frames is fair
    dropout: float
    view: TeacherView
    errors: ErrorSpec
    weight: Literal["uniform", "bell"]  # of noise levels in the loss: equal, or the bell that Wan was trained with
    lora: LoraSpec
    optimizer: OptimizerSpec
    ema: float
    save_every: int

    def __post_init__(self) -> None:
        require_at_least(1, steps=self.steps, batch=self.batch, target=self.target, shortest=self.shortest, save_every=self.save_every)
        if self.longest < self.shortest:
            raise ValueError(f"longest is {self.longest}, less than shortest {self.shortest}; use at least that")
        if not self.view.list_starts(self.shortest, self.longest):
            bounds = f"shortest is {self.shortest} and longest {self.longest}, but view.context is memory, where targets begin with a chunk"
            raise ValueError(f"{bounds} of {self.view.chunk}; use a longest of {-(-self.shortest // self.view.chunk) * self.view.chunk}")


class ClipsByLength:
    """Rows of clips in the order of their lengths, so that those of at least a given length are found at once."""

    def __init__(self, latents: EncodedClips, rows: Sequence[int]) -> None:
        self.rows = sorted(rows, key=lambda row: (latents.frames(row), row))
        self.lengths = [latents.frames(row) for row in self.rows]

    @property
    def longest(self) -> int:
        """Return the longest clip's latent frames."""
        return self.lengths[-1]

    def at_least(self, frames: int) -> list[int]:
        """Return the rows of clips that have at least so many latent frames."""
        return self.rows[bisect_left(self.lengths, frames) :]


class DrawnStarts:
    """The longest start that was drawn in training, which a checkpoint holds and layout.json states."""

    def __init__(self) -> None:
        self.longest = 0

    def state_dict(self) -> dict[str, int]:
        return {"longest": self.longest}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.longest = state["longest"]


class TeacherTrainer:
    """Error-recycling fine-tuning of the base model on continuations of real clips."""

    def __init__(
        self, spec: TeacherSpec, *, model: Denoiser, latents: EncodedClips, flow: Flow, seed: int, engine: EngineSpec = PLAIN
    ) -> None:
        self.spec, self.model, self.latents, self.flow = spec, model, latents, flow
        self.steps, self.save_every = spec.steps, spec.save_every
        if spec.lora.rank:
            attach_lora(model, spec.lora, seed)
        shortest = spec.view.list_starts(spec.shortest, spec.longest)[0]
        self.clips = ClipsByLength(latents, latents.rows("train", at_least=shortest + spec.target))
        self.allowed = spec.view.list_starts(shortest, min(spec.longest, self.clips.longest - spec.target))  # starts that clips allow
        self.starts = DrawnStarts()
        self.device = next(model.parameters()).device
        self.random = BatchRandom(seed, self.device, batch=spec.batch, groups=engine.count_groups(spec.batch))
        self.ema = EMA(model, spec.ema)  # before build_optimizer, which may split the model over the ranks
        self.optimizer = build_optimizer(model, spec.optimizer, spec.steps, engine)
        self.timer = StepTimer(self.device)
        self.bank = ErrorBank(spec.errors, (spec.target, *latents.shape))
        self.newest_batch: dict[str, Tensor] = {}

    @property
    def state(self) -> Mapping[str, Any]:
        """Everything that a step changes, by its name in a checkpoint."""
        parts = {"model": self.optimizer.weights, "average": self.ema, "optimizer": self.optimizer}
        return {**parts, "bank": self.bank, "starts": self.starts}

    def step(self, number: int) -> dict[str, float | Tensor]:
        """Take one step on a batch, and let the error bank collect the batch's residuals."""
        groups = [self._accumulate_group(number) for _ in self.random.groups(number)]
        # The bank changes after the whole batch only, so that every group draws from the same bank.
        self.bank.collect(*(residuals for _, residuals in groups))
        norm = self.optimizer.step()
        distance = self.ema.update()
        self.timer.lap("update")
        values = {name: average_groups([group[name] for group, _ in groups]) for name in groups[0][0]}
        return {**values, "gradient": norm, **self.bank.statistics(), "ema_distance": distance}

    def _accumulate_group(self, number: int) -> tuple[dict[str, float | Tensor], BatchResiduals]:
        """Add the gradient of one group of the batch; return the group's values and residuals."""
        spec, rng = self.spec, self.random.rng
        # Draw how many latent frames of the past there are: none, or uniform in shortest..longest; the paper: 5 to 20 seconds (sec. 4).
        # Choice: the start first, then clips that are long enough for it, so that short clips do not shorten the past of the others.
        start = 0 if self.random.coin(spec.no_context) else self.allowed[self.random.integers(0, len(self.allowed) - 1, 1)[0]]
        rows = draw_rows(self.clips.at_least(start + spec.target), spec.batch, self.random)
        self.starts.longest = max(self.starts.longest, start)
        # Draw what the teacher sees of that past: the slow-fast view (Fig. 3), or its fast frames alone.
        view = replace(spec.view, sink=0, slow=0) if self.random.coin(spec.fast_only) else spec.view
        starts = [self.random.integers(0, self.latents.frames(row) - start - spec.target, 1)[0] for row in rows]
        rows, starts = self.random.take_own(rows), self.random.take_own(starts)
        clip = self.latents.window(rows, starts, start + spec.target).to(self.device)  # [B, start + target, C, H, W]
        # The target X_{k+1:N}, [B, F, C, H, W], and the context X_{1:k} as the view cuts it, [B, K, C, H, W].
        shown = view.draw_context_frames(start, len(rows), rng)
        x, context = clip[:, start:], shown.cut(clip)
        text = drop_prompts(self.latents.text(rows).to(self.device), self.latents.empty_text, spec.dropout, self.random)
        # Noise levels of the whole batch, [batch]: each rank draws the errors of all rows.
        levels = self.flow.warp(torch.rand(spec.batch, generator=rng))
        self.newest_batch |= self.random.label(x=x, context=context, text=text, sigma=own_rows(levels, rng))
        self.timer.lap("data")
        # Sec. 3.4: perturb the context by errors from the bank, and learn to recover the correct velocity.
        loss, residuals = compute_erft_loss(
            self.model,
            x,
            text,
            context,
            levels,
            view=view,
            bank=self.bank,
            flow=self.flow,
            weight=spec.weight,
            step=number,
            rng=rng,
            filled=shown.filled,
        )
        self.optimizer.backward(loss / self.random.count)
        self.timer.lap("loss")
        values: dict[str, float | Tensor] = {"loss" if start else "loss_without_context": loss.detach(), "start": float(start)}
        return {**values, "context_frames": shown.mean_count}, residuals
