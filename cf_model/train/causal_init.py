"""The causal student's first weights: by teacher forcing, or by regression on the base model's own ODE trajectories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cf_model.model.denoiser import Denoiser
from cf_model.model.flow import Flow, add_noise, draw_gaussian
from cf_model.model.memory import ChunkComparison, Memory, MemorySpec, compare_newest_chunk, empty_memory
from cf_model.train.trainer.batch import EncodedClips, average_groups, draw_rows, drop_prompts
from cf_model.train.trainer.ema import EMA
from cf_model.train.trainer.engine import PLAIN, EngineSpec, OptimizerSpec, require_at_least
from cf_model.train.trainer.observe import StepTimer, join_comparisons, measure_promotion
from cf_model.train.trainer.ranks import BatchRandom
from cf_model.train.trainer.zero import build_optimizer
from cf_model.train.trajectories import OdeSpec, OdeTrajectories


@dataclass(frozen=True)
class CausalInitSpec:
    """Settings of the stage `causal_init`."""

    method: Literal["teacher_forcing", "ode"]
    steps: int
    batch: int
    frames: int  # latent frames that are denoised
    longest: int  # most latent frames before them that are only remembered (teacher_forcing)
    begin: float  # share of the steps without frames before: the video begins with `frames` (teacher_forcing)
    chunk: int
    dropout: float  # share of prompts that are left out (teacher_forcing)
    ode: OdeSpec  # settings of the method ode
    memory: MemorySpec
    optimizer: OptimizerSpec
    ema: float
    save_every: int

    def __post_init__(self) -> None:
        require_at_least(1, steps=self.steps, batch=self.batch, frames=self.frames, chunk=self.chunk, save_every=self.save_every)
        self.memory.check_chunk(self.chunk)
        for name in ("frames", "longest"):
            if getattr(self, name) % self.chunk:
                raise ValueError(f"{name} is {getattr(self, name)}, not whole chunks of {self.chunk} latent frames")


class CausalInitTrainer:
    """Training of the causal student's first weights, by either method."""

    def __init__(
        self,
        spec: CausalInitSpec,
        *,
        model: Denoiser,
        latents: EncodedClips,
        flow: Flow,
        seed: int,
        trajectories: OdeTrajectories | None = None,
        engine: EngineSpec = PLAIN,
    ) -> None:
        """`trajectories`, computed already, choose the method ode; None chooses teacher forcing."""
        self.spec, self.model, self.latents, self.flow, self.trajectories = spec, model, latents, flow, trajectories
        self.steps, self.save_every = spec.steps, spec.save_every
        self.device = next(model.parameters()).device
        self.random = BatchRandom(seed, self.device, batch=spec.batch, groups=engine.count_groups(spec.batch))
        self.ema = EMA(model, spec.ema)  # before build_optimizer, which may split the model over the ranks
        self.optimizer = build_optimizer(model, spec.optimizer, spec.steps, engine)
        self.timer, self.comparisons = StepTimer(self.device), list[list[ChunkComparison]]()  # of the step's groups, for the log
        self.newest_batch: dict[str, Tensor] = {}
        self.rows = [] if trajectories else latents.rows("train", at_least=spec.longest + spec.frames)

    @property
    def state(self) -> Mapping[str, Any]:
        """Everything that a step changes, by its name in a checkpoint."""
        return {"model": self.optimizer.weights, "average": self.ema, "optimizer": self.optimizer}

    def step(self, number: int) -> dict[str, float | Tensor]:
        """Take one step on a batch."""
        losses, remembered = list[Tensor](), list[Tensor]()
        self.comparisons.clear()
        for _ in self.random.groups(number):
            self.comparisons.append([])
            loss, memory = self._regress_on_ode(self.trajectories) if self.trajectories else self._force_teacher()
            self.optimizer.backward(loss / self.random.count)
            losses.append(loss.detach())
            remembered.append(memory.count_slow() + len(memory.sink) + len(memory.fast))
            self.timer.lap("loss")
        norm = self.optimizer.step()
        distance = self.ema.update()
        self.timer.lap("update")
        promotion = measure_promotion(self.spec.memory, join_comparisons(self.comparisons))
        values = {"loss": average_groups(losses), "gradient": norm, "context_frames": average_groups(remembered)}
        return {**values, **promotion, "ema_distance": distance}

    def _force_teacher(self) -> tuple[Tensor, Memory]:
        """Teacher forcing: denoise each chunk of a real video after the clean chunks before it. Return the loss and the last memory."""
        spec, rng = self.spec, self.random.rng
        rows = draw_rows(self.rows, spec.batch, self.random)
        # Choice: part of the clips begin before the frames that are denoised, so that the student has read a full memory
        # of real frames before it meets its own.
        past = 0 if self.random.coin(spec.begin) else spec.chunk * self.random.integers(0, spec.longest // spec.chunk, 1)[0]
        starts = [self.random.integers(0, self.latents.frames(row) - past - spec.frames, 1)[0] for row in rows]
        rows, starts = self.random.take_own(rows), self.random.take_own(starts)
        clip = self.latents.window(rows, starts, past + spec.frames).to(self.device)  # [B, past + frames, C, H, W]
        text = drop_prompts(self.latents.text(rows).to(self.device), self.latents.empty_text, spec.dropout, self.random)
        self.newest_batch |= self.random.label(clip=clip, text=text)
        self.timer.lap("data")
        # Fill the memory with the past, without gradient.
        memory = empty_memory(spec.memory)
        if past:
            memory = self.model.remember_clip(clip[:, :past], text, spec.memory, chunk=spec.chunk)
        loss, chunks = clip.new_zeros(()), clip[:, past:].split(spec.chunk, dim=1)  # each [B, chunk, C, H, W]
        for x in chunks:
            # Each chunk has its own noise level, and sees the clean chunks before it through the memory.
            sigma = self.flow.sample_sigma(len(x), rng)
            noise = draw_gaussian(x.shape, rng)
            velocity = self.model.velocity(add_noise(x, noise, sigma), sigma, text, memory)
            loss = loss + (velocity - (noise - x)).square().mean() / len(chunks)
            # The clean pass has a gradient, so that the model also learns which keys and values are useful to later chunks.
            memory = self.model.remember(x, text, memory, grad=True)
            self.comparisons[-1] += compare_newest_chunk(memory)
        return loss, memory

    def _regress_on_ode(self, trajectories: OdeTrajectories) -> tuple[Tensor, Memory]:
        """ODE regression: predict x_0 of each chunk from a stored state of the base model's trajectory. Return loss and last memory.

        `# Choice:` as published, a chunk sees the chunks before it at the noise levels drawn for them, with no clean pass, through the
        student's memory, which is block-causal attention as far as the memory reaches. A chunk drawn at x_0 has no loss; such chunks
        show the student clean context.
        """
        spec, chunks = self.spec, self.spec.frames // self.spec.chunk
        # Draw videos, and for each of their chunks one of the K stored states.
        videos = self.random.integers(0, trajectories.spec.videos - 1, spec.batch)
        drawn = torch.tensor(self.random.integers(0, len(trajectories.sigmas) - 1, spec.batch * chunks)).view(spec.batch, chunks)
        # The loss is a mean over the batch's noisy chunks; this group's share of their number:
        noisy = max(1, int((drawn < len(trajectories.sigmas) - 1).sum())) / self.random.parts
        videos, levels = self.random.take_own(videos), torch.stack(self.random.take_own(list(drawn)))  # levels: [B, chunks]
        states, text = trajectories.read(videos).to(self.device), trajectories.text(videos).to(self.device)
        self.newest_batch |= self.random.label(states=states, text=text, levels=levels)
        self.timer.lap("data")
        parts = states.split(spec.chunk, dim=2)  # [B, K, F, C, H, W] to chunks of [B, K, chunk, C, H, W]
        sigmas = torch.tensor(trajectories.sigmas)[levels].to(states)  # [B, chunks]
        loss, memory = states.new_zeros(()), empty_memory(spec.memory)
        samples = torch.arange(len(states))
        for number, part in enumerate(parts):
            x_t, x_0, sigma = part[samples, levels[:, number]], part[:, -1], sigmas[:, number]
            difference = self.model(x_t, sigma, text, memory) - x_0  # exactly 0 where sigma is 0
            loss = loss + difference.square().mean(dim=(1, 2, 3, 4)).sum()
            remembered, level = (x_0, None) if trajectories.spec.context == "clean" else (x_t, sigma)
            memory = self.model.remember(remembered, text, memory, sigma=level, grad=True)
            self.comparisons[-1] += compare_newest_chunk(memory)
        return loss / noisy, memory
