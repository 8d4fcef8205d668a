"""The bidirectional base model: text to one window of video, by flow matching."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from cf_model.model.denoiser import Denoiser
from cf_model.model.flow import Flow, add_noise, gaussian
from cf_model.train.trainer.loop import (
    PLAIN,
    Average,
    Clips,
    EngineSpec,
    OptimizerSpec,
    Random,
    at_least,
    batches,
    build_optimizer,
    drop_prompts,
    mean,
)
from cf_model.train.trainer.observe import Clock


@dataclass(frozen=True)
class BaseSpec:
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
        at_least(1, steps=self.steps, batch=self.batch, window=self.window, save_every=self.save_every)


class Base:
    def __init__(
        self, spec: BaseSpec, *, model: Denoiser, latents: Clips, flow: Flow, seed: int, engine: EngineSpec = PLAIN
    ) -> None:
        self.spec, self.model, self.latents, self.flow = spec, model, latents, flow
        self.rows = latents.rows("train", at_least=spec.window)
        self.device = next(model.parameters()).device
        self.random = Random(seed, self.device, groups=engine.groups(spec.batch))
        self.average = Average(model, spec.ema)
        self.optimizer = build_optimizer(model, spec.optimizer, spec.steps, engine)
        self.clock = Clock(self.device)
        self.seen: dict[str, Tensor] = {}

    @property
    def state(self) -> Mapping[str, Any]:
        return {"model": self.optimizer.weights, "average": self.average, "optimizer": self.optimizer, "random": self.random}

    def step(self, number: int) -> dict[str, float]:
        losses = [self._loss() for _ in self.random.groups()]
        norm = self.optimizer.step()
        distance = self.average.update()
        self.clock.lap("update")
        return {"loss": mean(losses), "gradient": norm, "ema_distance": distance}

    def _loss(self) -> float:
        """Of one group of the batch, whose gradient is added."""
        rng = self.random.rng
        rows = batches(self.rows, self.spec.batch, self.random)
        # Choice: a window may begin anywhere in a clip; with the linear codec any latent can be the first of a video.
        starts = [self.random.integers(0, self.latents.frames(row) - self.spec.window, 1)[0] for row in rows]
        rows, starts = self.random.mine(rows), self.random.mine(starts)
        x = self.latents.window(rows, starts, self.spec.window).to(self.device)
        text = drop_prompts(self.latents.text(rows).to(self.device), self.latents.empty_text, self.spec.dropout, self.random)
        sigma = self.flow.sample_sigma(len(x), rng)
        noise = gaussian(x.shape, rng)
        self.seen |= self.random.label(x=x, text=text, sigma=sigma)
        self.clock.lap("data")
        loss = (self.model.velocity(add_noise(x, noise, sigma), sigma, text) - (noise - x)).square().mean()
        self.optimizer.backward(loss / self.random.count)
        self.clock.lap("loss")
        return loss.item()
