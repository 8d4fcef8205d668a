"""The context teacher: the base model learns to go on from a long past, by error-recycling fine-tuning (sec. 3.4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from cf_model.model.denoiser import Denoiser
from cf_model.model.flow import Flow, share
from cf_model.model.view import TeacherView
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

from .adapter import LoraSpec, attach
from .erft import ErrorBank, ErrorSpec, Mistakes, erft_loss


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
    def __init__(
        self, spec: TeacherSpec, *, model: Denoiser, latents: Clips, flow: Flow, seed: int, engine: EngineSpec = PLAIN
    ) -> None:
        self.spec, self.model, self.latents, self.flow = spec, model, latents, flow
        if spec.lora.rank:
            attach(model, spec.lora, seed)
        self.rows = latents.rows("train", at_least=spec.shortest + spec.target)
        self.device = next(model.parameters()).device
        self.random = Random(seed, self.device, groups=engine.groups(spec.batch))
        self.average = Average(model, spec.ema)
        self.optimizer = build_optimizer(model, spec.optimizer, spec.steps, engine)
        self.clock = Clock(self.device)
        self.bank = ErrorBank(spec.errors, (spec.target, *latents.shape))
        self.seen: dict[str, Tensor] = {}

    @property
    def state(self) -> Mapping[str, Any]:
        parts = {"model": self.optimizer.weights, "average": self.average, "optimizer": self.optimizer}
        return {**parts, "bank": self.bank, "random": self.random}

    def step(self, number: int) -> dict[str, float]:
        made = [self._loss(number) for _ in self.random.groups()]
        self.bank.collect(*(found for _, found in made))
        norm = self.optimizer.step()
        distance = self.average.update()
        self.clock.lap("update")
        values = {name: mean([one[name] for one, _ in made]) for name in made[0][0]}
        return {**values, "gradient": norm, **self.bank.statistics(), "ema_distance": distance}

    def _loss(self, number: int) -> tuple[dict[str, float], Mistakes]:
        """Of one group of the batch, whose gradient is added; and its mistakes."""
        spec, rng = self.spec, self.random.rng
        rows = batches(self.rows, spec.batch, self.random)
        longest = min(spec.longest, *(self.latents.frames(row) - spec.target for row in rows))
        start = 0 if self.random.coin(spec.no_context) else self.random.integers(spec.shortest, longest, 1)[0]
        view = replace(spec.view, sink=0, slow=0) if self.random.coin(spec.fast_only) else spec.view
        starts = [self.random.integers(0, self.latents.frames(row) - start - spec.target, 1)[0] for row in rows]
        rows, starts = self.random.mine(rows), self.random.mine(starts)
        clip = self.latents.window(rows, starts, start + spec.target).to(self.device)
        x, context = clip[:, start:], clip[:, view.frames(start)]
        text = drop_prompts(self.latents.text(rows).to(self.device), self.latents.empty_text, spec.dropout, self.random)
        levels = self.flow.warp(torch.rand(spec.batch, generator=rng))  # of the whole batch: each rank draws everyone's mistakes
        self.seen |= self.random.label(x=x, context=context, text=text, sigma=share(levels, rng))
        self.clock.lap("data")
        loss, found = erft_loss(
            self.model, x, text, context, levels, view=view, bank=self.bank, flow=self.flow, weight=spec.weight, step=number, rng=rng
        )
        self.optimizer.backward(loss / self.random.count)
        self.clock.lap("loss")
        return {"loss" if start else "loss_without_context": loss.item(), "context_frames": float(context.shape[1])}, found
