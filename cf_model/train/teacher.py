"""The context teacher: the base model learns to go on from a long past, by error-recycling fine-tuning (sec. 3.4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from cf_model.model.denoiser import Denoiser
from cf_model.model.flow import Flow
from cf_model.model.view import TeacherView

from .adapter import LoraSpec, attach
from .erft import ErrorBank, ErrorSpec, erft_loss
from .loop import Average, Clips, Optimizer, OptimizerSpec, Random, at_least, batches, drop_prompts
from .observe import Clock


@dataclass(frozen=True)
class TeacherSpec:
    steps: int
    batch: int
    target: int  # latent frames the teacher goes on for
    shortest: int  # latent frames from the clip's beginning to the target, at least
    longest: int  # and at most
    no_context: float  # share of the steps without a past, so that it can also begin a video
    fast_only: float  # share with the fast frames alone, so that leaving the others out can be compared fairly
    dropout: float
    view: TeacherView
    errors: ErrorSpec
    weight: Literal["uniform", "bell"]  # of noise levels in the loss: none, or as Wan was trained
    lora: LoraSpec
    optimizer: OptimizerSpec
    ema: float
    save_every: int

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, batch=self.batch, target=self.target, shortest=self.shortest, save_every=self.save_every)
        if self.longest < self.shortest:
            raise ValueError(f"longest is {self.longest}, less than shortest {self.shortest}; use at least that")


class Teacher:
    def __init__(self, spec: TeacherSpec, *, model: Denoiser, latents: Clips, flow: Flow, seed: int) -> None:
        self.spec, self.model, self.latents, self.flow = spec, model, latents, flow
        if spec.lora.rank:
            attach(model, spec.lora, seed)
        self.rows = latents.rows("train", at_least=spec.shortest + spec.target)
        self.optimizer = Optimizer(model, spec.optimizer, spec.steps)
        self.average = Average(model, spec.ema)
        self.bank = ErrorBank(spec.errors, (spec.target, *latents.shape))
        self.device = next(model.parameters()).device
        self.random = Random(seed, self.device)
        self.clock = Clock(self.device)
        self.seen: dict[str, Tensor] = {}

    @property
    def state(self) -> Mapping[str, Any]:
        return {"model": self.model, "average": self.average, "optimizer": self.optimizer, "bank": self.bank, "random": self.random}

    def step(self, number: int) -> dict[str, float]:
        spec, rng = self.spec, self.random.rng
        rows = batches(self.rows, spec.batch, self.random)
        longest = min(spec.longest, *(self.latents.frames(row) - spec.target for row in rows))
        start = 0 if self.random.coin(spec.no_context) else self.random.integers(spec.shortest, longest, 1)[0]
        view = replace(spec.view, sink=0, slow=0) if self.random.coin(spec.fast_only) else spec.view
        starts = [self.random.integers(0, self.latents.frames(row) - start - spec.target, 1)[0] for row in rows]
        clip = self.latents.window(rows, starts, start + spec.target).to(self.device)
        x, context = clip[:, start:], clip[:, view.frames(start)]
        text = drop_prompts(self.latents.text(rows).to(self.device), self.latents.empty_text, spec.dropout, self.random)
        sigma = self.flow.sample_sigma(len(x), rng)
        self.seen.update(x=x, context=context, text=text, sigma=sigma)
        self.clock.lap("data")
        loss = erft_loss(
            self.model, x, text, context, sigma, view=view, bank=self.bank, flow=self.flow, weight=spec.weight, step=number, rng=rng
        )
        loss.backward()
        self.clock.lap("loss")
        norm = self.optimizer.step()
        self.average.update()
        self.clock.lap("update")
        name = "loss" if start else "loss_without_context"
        values = {name: loss.item(), "gradient": norm, "context_frames": float(context.shape[1]), **self.bank.statistics()}
        return values | {"ema_distance": self.average.distance()}
