"""The causal student's first weights: by teacher forcing, or by regression on the base model's own trajectories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cf_model.model.denoiser import Denoiser
from cf_model.model.flow import Flow, add_noise, gaussian
from cf_model.model.memory import Compared, Memory, MemorySpec, compared, empty
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
from cf_model.train.trainer.observe import Clock, remembered
from cf_model.train.trainer.ode import OdeSpec, Trajectories


@dataclass(frozen=True)
class CausalInitSpec:
    method: Literal["teacher_forcing", "ode"]
    steps: int
    batch: int
    frames: int  # latent frames that are denoised
    longest: int  # latent frames before them, at most, that are only remembered (teacher_forcing)
    begin: float  # share of the steps without any: the video begins with `frames` (teacher_forcing)
    chunk: int
    dropout: float  # share of prompts that are left out (teacher_forcing)
    ode: OdeSpec  # what else the method ode needs
    memory: MemorySpec
    optimizer: OptimizerSpec
    ema: float
    save_every: int

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, batch=self.batch, frames=self.frames, chunk=self.chunk, save_every=self.save_every)
        self.memory.hold(self.chunk)
        for name in ("frames", "longest"):
            if getattr(self, name) % self.chunk:
                raise ValueError(f"{name} is {getattr(self, name)}, not whole chunks of {self.chunk} latent frames")


class CausalInit:
    def __init__(
        self,
        spec: CausalInitSpec,
        *,
        model: Denoiser,
        latents: Clips,
        flow: Flow,
        seed: int,
        trajectories: Trajectories | None = None,
        engine: EngineSpec = PLAIN,
    ) -> None:
        """`trajectories` are needed by the method ode, and must have been made."""
        self.spec, self.model, self.latents, self.flow, self.trajectories = spec, model, latents, flow, trajectories
        self.device = next(model.parameters()).device
        self.random = Random(seed, self.device, groups=engine.groups(spec.batch))
        self.average = Average(model, spec.ema)
        self.optimizer = build_optimizer(model, spec.optimizer, spec.steps, engine)
        self.clock, self.compared = Clock(self.device), list[Compared]()
        self.seen: dict[str, Tensor] = {}
        self.rows = [] if trajectories else latents.rows("train", at_least=spec.longest + spec.frames)

    @property
    def state(self) -> Mapping[str, Any]:
        return {"model": self.optimizer.weights, "average": self.average, "optimizer": self.optimizer, "random": self.random}

    def step(self, number: int) -> dict[str, float]:
        losses: list[float] = []
        for _ in self.random.groups():
            self.compared.clear()
            loss, memory = self._ode(self.trajectories) if self.trajectories else self._teacher_forcing()
            self.optimizer.backward(loss / self.random.count)
            losses.append(loss.item())
            self.clock.lap("loss")
        norm = self.optimizer.step()
        distance = self.average.update()
        self.clock.lap("update")
        values = {"loss": mean(losses), "gradient": norm, "context_frames": float(sum(map(len, memory.held().values())))}
        return values | remembered(self.spec.memory, self.compared) | {"ema_distance": distance}

    def _teacher_forcing(self) -> tuple[Tensor, Memory]:
        """Each chunk of a real video is denoised after the clean ones before it."""
        spec, rng = self.spec, self.random.rng
        rows = batches(self.rows, spec.batch, self.random)
        # Choice: part of the clips begin before the frames that are denoised, so that the student has read a full memory
        # of real frames before it meets its own.
        past = 0 if self.random.coin(spec.begin) else spec.chunk * self.random.integers(0, spec.longest // spec.chunk, 1)[0]
        starts = [self.random.integers(0, self.latents.frames(row) - past - spec.frames, 1)[0] for row in rows]
        rows, starts = self.random.mine(rows), self.random.mine(starts)
        clip = self.latents.window(rows, starts, past + spec.frames).to(self.device)
        text = drop_prompts(self.latents.text(rows).to(self.device), self.latents.empty_text, spec.dropout, self.random)
        self.seen |= self.random.label(clip=clip, text=text)
        self.clock.lap("data")
        memory = self.model.watch(clip[:, :past], text, spec.memory, chunk=spec.chunk) if past else empty(spec.memory)
        loss, chunks = clip.new_zeros(()), clip[:, past:].split(spec.chunk, dim=1)
        for x in chunks:
            sigma = self.flow.sample_sigma(len(x), rng)  # its own level for every chunk
            noise = gaussian(x.shape, rng)
            velocity = self.model.velocity(add_noise(x, noise, sigma), sigma, text, memory)
            loss = loss + (velocity - (noise - x)).square().mean() / len(chunks)
            memory = self.model.remember(x, text, memory, grad=True)  # what is worth remembering is learned too
            self.compared += compared(memory)
        return loss, memory

    def _ode(self, made: Trajectories) -> tuple[Tensor, Memory]:
        """Each chunk is at one of the kept states of the base model's way to a video, and the student names its end.

        `# Choice:` as published, a chunk sees those before it as noisy as they happen to be, with no clean pass: chunk after
        chunk through the student's memory, which is block-causal attention as far as the memory reaches. A chunk that is
        at x_0 already has no loss; it is what shows the student clean context.
        """
        spec, chunks = self.spec, self.spec.frames // self.spec.chunk
        videos = self.random.integers(0, made.spec.videos - 1, spec.batch)
        drawn = torch.tensor(self.random.integers(0, len(made.sigmas) - 1, spec.batch * chunks)).view(spec.batch, chunks)
        noisy = max(1, int((drawn < len(made.sigmas) - 1).sum())) / self.random.rng.parts  # this group's share of all that have a loss
        videos, levels = self.random.mine(videos), torch.stack(self.random.mine(list(drawn)))
        states, text = made.read(videos).to(self.device), made.text(videos).to(self.device)
        self.seen |= self.random.label(states=states, text=text, levels=levels)
        self.clock.lap("data")
        parts = states.split(spec.chunk, dim=2)
        sigmas = torch.tensor(made.sigmas)[levels].to(states)
        loss, memory, each = states.new_zeros(()), empty(spec.memory), torch.arange(len(states))
        for number, part in enumerate(parts):
            x_t, x_0, sigma = part[each, levels[:, number]], part[:, -1], sigmas[:, number]
            wrong = self.model(x_t, sigma, text, memory) - x_0  # exactly 0 where sigma is 0
            loss = loss + wrong.square().mean(dim=(1, 2, 3, 4)).sum()
            shown, level = (x_0, None) if made.spec.context == "clean" else (x_t, sigma)
            memory = self.model.remember(shown, text, memory, sigma=level, grad=True)
            self.compared += compared(memory)
        return loss / noisy, memory
