"""The bidirectional base model: text to one window of video, by flow matching."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from cf_model.model.denoiser import Denoiser
from cf_model.model.flow import Flow, add_noise, draw_gaussian
from cf_model.train.trainer.batch import EncodedClips, average_groups, draw_rows, drop_prompts
from cf_model.train.trainer.ema import EMA
from cf_model.train.trainer.engine import PLAIN, EngineSpec, OptimizerSpec, require_at_least
from cf_model.train.trainer.observe import StepTimer
from cf_model.train.trainer.ranks import BatchRandom
from cf_model.train.trainer.zero import build_optimizer


@dataclass(frozen=True)
class BaseSpec:
    """Settings of the stage `base`."""

    init: Literal["scratch", "wan"]
    weights: str | None  # of Wan's: a folder in any layout that `cf import-weights` reads, or a name on the Hugging Face Hub
    steps: int
    batch: int
    window: int  # latent frames
    dropout: float  # share of prompts that are left out, for guidance
    optimizer: OptimizerSpec
    ema: float
    save_every: int

    def __post_init__(self) -> None:
        require_at_least(1, steps=self.steps, batch=self.batch, window=self.window, save_every=self.save_every)


class BaseTrainer:
    """Flow matching on windows of the training clips."""

    def __init__(
        self, spec: BaseSpec, *, model: Denoiser, latents: EncodedClips, flow: Flow, seed: int, engine: EngineSpec = PLAIN
    ) -> None:
        self.spec, self.model, self.latents, self.flow = spec, model, latents, flow
        self.steps, self.save_every = spec.steps, spec.save_every
        self.rows = latents.rows("train", at_least=spec.window)
        self.device = next(model.parameters()).device
        self.random = BatchRandom(seed, self.device, batch=spec.batch, groups=engine.count_groups(spec.batch))
        self.ema = EMA(model, spec.ema)  # before build_optimizer, which may split the model over the ranks
        self.optimizer = build_optimizer(model, spec.optimizer, spec.steps, engine)
        self.timer = StepTimer(self.device)
        self.newest_batch: dict[str, Tensor] = {}

    @property
    def state(self) -> Mapping[str, Any]:
        """Everything that a step changes, by its name in a checkpoint."""
        return {"model": self.optimizer.weights, "average": self.ema, "optimizer": self.optimizer}

    def step(self, number: int) -> dict[str, float | Tensor]:
        """Take one step on a batch; return its loss, gradient norm and the distance of the average."""
        losses = [self._accumulate_group() for _ in self.random.groups(number)]
        norm = self.optimizer.step()
        distance = self.ema.update()
        self.timer.lap("update")
        return {"loss": average_groups(losses), "gradient": norm, "ema_distance": distance}

    def _accumulate_group(self) -> Tensor:
        """Add the gradient of one group of the batch; return the group's loss."""
        rng = self.random.rng
        # Draw clips, and where in each clip the window begins: of the whole batch first, then this group's own rows.
        rows = draw_rows(self.rows, self.spec.batch, self.random)
        # Choice: a window may begin anywhere in a clip; with the linear codec any latent can be the first of a video.
        starts = [self.random.integers(0, self.latents.frames(row) - self.spec.window, 1)[0] for row in rows]
        rows, starts = self.random.take_own(rows), self.random.take_own(starts)
        x = self.latents.window(rows, starts, self.spec.window).to(self.device)  # x_0: [B, F, C, H, W]
        text = drop_prompts(self.latents.text(rows).to(self.device), self.latents.empty_text, self.spec.dropout, self.random)  # [B, T, E]
        # Draw one noise level a sample: x_σ = (1 - σ) x_0 + σ ε.
        sigma = self.flow.sample_sigma(len(x), rng)  # [B]
        noise = draw_gaussian(x.shape, rng)
        self.newest_batch |= self.random.label(x=x, text=text, sigma=sigma)
        self.timer.lap("data")
        # Flow matching: |v(x_σ, σ, text) - (ε - x_0)|², one bidirectional pass over the window.
        loss = (self.model.velocity(add_noise(x, noise, sigma), sigma, text) - (noise - x)).square().mean()
        self.optimizer.backward(loss / self.random.count)
        self.timer.lap("loss")
        return loss.detach()
