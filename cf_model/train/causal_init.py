"""The causal student's first weights, by teacher forcing: each chunk is denoised after the clean ones before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cf_model.model.denoiser import Denoiser
from cf_model.model.flow import Flow, add_noise, gaussian
from cf_model.model.memory import MemorySpec, empty

from .loop import Average, Clips, Optimizer, OptimizerSpec, Random, at_least, batches, drop_prompts


@dataclass(frozen=True)
class CausalInitSpec:
    method: Literal["teacher_forcing", "ode"]
    steps: int
    batch: int
    frames: int  # latent frames that are denoised
    longest: int  # latent frames before them, at most, that are only remembered
    begin: float  # share of the steps without any: the video begins with `frames`
    chunk: int
    dropout: float
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
    def __init__(self, spec: CausalInitSpec, *, model: Denoiser, latents: Clips, flow: Flow, seed: int) -> None:
        self.spec, self.model, self.latents, self.flow = spec, model, latents, flow
        self.rows = latents.rows("train", at_least=spec.longest + spec.frames)
        self.optimizer = Optimizer(model, spec.optimizer, spec.steps)
        self.average = Average(model, spec.ema)
        self.random = Random(seed)

    @property
    def state(self) -> Mapping[str, Any]:
        return {"model": self.model, "average": self.average, "optimizer": self.optimizer, "random": self.random}

    def step(self, number: int) -> dict[str, float]:
        spec, rng = self.spec, self.random.rng
        rows = batches(self.rows, spec.batch, self.random)
        # Choice: part of the clips begin before the frames that are denoised, so that the student has read a full memory
        # of real frames before it meets its own.
        past = 0 if self.random.coin(spec.begin) else spec.chunk * self.random.integers(0, spec.longest // spec.chunk, 1)[0]
        starts = [self.random.integers(0, self.latents.frames(row) - past - spec.frames, 1)[0] for row in rows]
        clip = self.latents.window(rows, starts, past + spec.frames)
        text = drop_prompts(self.latents.text(rows), self.latents.empty_text, spec.dropout, self.random)
        memory = self.model.watch(clip[:, :past], text, spec.memory, chunk=spec.chunk) if past else empty(spec.memory)
        loss, chunks = clip.new_zeros(()), clip[:, past:].split(spec.chunk, dim=1)
        for x in chunks:
            sigma = self.flow.sample_sigma(len(x), rng)  # its own level for every chunk
            noise = gaussian(x.shape, rng)
            velocity = self.model.velocity(add_noise(x, noise, sigma), sigma, text, memory)
            loss = loss + (velocity - (noise - x)).square().mean() / len(chunks)
            memory = self.model.remember(x, text, memory, grad=True)  # what is worth remembering is learned too
        loss.backward()
        norm = self.optimizer.step()
        self.average.update()
        return {"loss": loss.item(), "gradient": norm, "context_frames": float(sum(map(len, memory.held().values())))}
