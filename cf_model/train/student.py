"""Stages 1 and 2: the causal student learns from its own rollouts, scored by a teacher (secs. 3.1, 3.2; alg. 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from cf_model.model.denoiser import Denoiser
from cf_model.model.flow import Flow
from cf_model.model.memory import Memory, MemorySpec
from cf_model.model.rollout import HorizonSpec, Rollout, RolloutSpec, rollout
from cf_model.model.view import GuidancePasses, TeacherView
from cf_model.train.distill import measure_student_loss
from cf_model.train.trainer.batch import average_groups, draw_rows
from cf_model.train.trainer.ema import EMA
from cf_model.train.trainer.engine import PLAIN, EngineSpec, OptimizerSpec, require_at_least
from cf_model.train.trainer.observe import StepTimer, measure_promotion
from cf_model.train.trainer.ranks import BatchRandom
from cf_model.train.trainer.zero import build_optimizer

from .distill import compute_critic_loss, compute_generator_gradient, replay_window
from .past import RolloutStreams, SharedRollouts


@dataclass(frozen=True)
class ScoreSpec:
    """What teacher and critic see of the past, and how strongly the teacher follows the prompt."""

    context: Literal["none", "sparse", "contiguous"]
    guidance: float  # null + guidance (cond - null); Self-Forcing's 3.0 is our 4.0
    guidance_passes: GuidancePasses  # the teacher's two, one after the other or as one batch
    mismatch: Literal["refuse", "accept"]  # a context in another layout than the teacher was trained on
    first_latent: Literal["as_is", "reencode"]  # the first frame that they see, where it isn't the video's: as a picture of its own

    def __post_init__(self) -> None:
        require_at_least(1, guidance=self.guidance)


@dataclass(frozen=True)
class StudentSpec:
    """One distillation stage. Stage 1 and stage 2 are two of these."""

    steps: int  # updates of the critic
    critic_updates: int  # for one of the student
    rollouts: Literal["each", "shared"]  # of the critic's updates: a new one each, or one for all until the student's
    batch: int
    memory: MemorySpec
    rollout: RolloutSpec
    horizon: HorizonSpec
    teacher: ScoreSpec
    critic_weight: Literal["uniform", "bell"]
    student_optimizer: OptimizerSpec
    critic_optimizer: OptimizerSpec
    ema: float
    ema_start: int  # updates of the student before the average begins
    save_every: int

    def __post_init__(self) -> None:
        require_at_least(1, steps=self.steps, critic_updates=self.critic_updates, batch=self.batch, save_every=self.save_every)
        if self.steps < self.critic_updates:
            raise ValueError(f"steps is {self.steps}, less than critic_updates {self.critic_updates}: the student would never change")
        chunk = self.rollout.chunk
        if self.ema_start >= self.steps // self.critic_updates:
            updates = self.steps // self.critic_updates
            raise ValueError(f"ema_start is {self.ema_start}, but the student is updated {updates} times; use less")
        for name in ("shortest", "longest"):
            value = getattr(self.horizon, name)
            if value % chunk:
                down = value // chunk * chunk
                raise ValueError(f"horizon.{name} is {value}, not whole chunks of {chunk} latent frames; use {down} or {down + chunk}")
        if self.rollouts == "shared" and self.rollout.persist == "stream":
            stated = "rollouts is shared, but rollout.persist is stream, where every step makes the next part of a video"
            raise ValueError(f"{stated}; use rollouts: each, or rollout.persist: fresh")
        self.memory.check_chunk(chunk)
        if self.horizon.shortest < self.rollout.window:
            raise ValueError(f"horizon.shortest is {self.horizon.shortest}, below rollout.window {self.rollout.window}; use at least that")


class PromptSet(Protocol):
    """Embedded prompts, read as they are drawn: a training set's do not fit into memory. A tensor [P, T, E] is one, too."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: list[int], /) -> Tensor: ...


class DistillationTrainer:
    """The moving parts of one distillation: the critic learns at every step, the student at every `critic_updates`-th."""

    def __init__(
        self,
        spec: StudentSpec,
        *,
        student: Denoiser,
        teacher: Denoiser,
        critic: Denoiser,
        view: TeacherView,
        flow: Flow,
        prompts: PromptSet,
        null: Float[Tensor, "T E"],
        shape: tuple[int, int, int],
        seed: int,
        reencode: Callable[[Float[Tensor, "B F C H W"]], Float[Tensor, "B 1 C H W"]] | None = None,
        engine: EngineSpec = PLAIN,
    ) -> None:
        """`reencode` makes the last video frame of some latents a picture's latent (`first_latent: reencode`)."""
        device = next(student.parameters()).device
        self.null, self.prompts, self.reencode = null.to(device), prompts, reencode
        self.spec, self.view, self.flow, self.shape = spec, view, flow, shape
        self.student, self.critic, self.teacher = student, critic, teacher.requires_grad_(False)
        self.random = BatchRandom(seed, device, groups=engine.groups(spec.batch))
        self.average = EMA(student, spec.ema, spec.ema_start)
        self.student_optimizer = build_optimizer(student, spec.student_optimizer, spec.steps // spec.critic_updates, engine)
        self.critic_optimizer = build_optimizer(critic, spec.critic_optimizer, spec.steps, engine)
        self.streams = RolloutStreams(spec.memory, self.random, device)
        self.kept = SharedRollouts()
        self.clock = StepTimer(device)
        self.seen: dict[str, Tensor] = {}

    @property
    def state(self) -> Mapping[str, Any]:
        return {
            "student": self.student_optimizer.weights,
            "critic": self.critic_optimizer.weights,
            "average": self.average,
            "student_optimizer": self.student_optimizer,
            "critic_optimizer": self.critic_optimizer,
            "random": self.random,
            "streams": self.streams,
            "kept": self.kept,
        }

    def step(self, number: int) -> dict[str, float]:
        """One update of the critic; every `critic_updates`-th time one of the student too, on the same rollout."""
        last = (number + 1) % self.spec.critic_updates == 0
        groups = [self._group(number, group, last) for group in self.random.groups()]
        values = {name: average_groups([one[name] for one in groups]) for name in groups[0]}
        if last:
            values["student_gradient"] = self.student_optimizer.step()
            values["ema_distance"] = self.average.update()
            self.kept.clear()
        values["critic_gradient"] = self.critic_optimizer.step()
        self.clock.lap("update")
        return values

    def _group(self, number: int, group: int, last: bool) -> dict[str, float]:
        """Adds the gradients of one group of the batch: of the critic, and with `last` of the student."""
        spec = self.spec
        made, text = self._made(number, group)
        self.clock.lap("rollout")
        context, target = self.shown(made)
        self.clock.lap("data")
        self.seen |= self.random.label(target=target, context=context, text=text)
        past = self.view.read_context(self.critic, text, context)  # for both updates: the student's doesn't change the critic
        values = self._student_gradient(made, target, context, text, past) if last else {}
        loss = compute_critic_loss(
            target,
            text,
            fake=self.critic,
            context=context,
            view=self.view,
            flow=self.flow,
            rng=self.random.rng,
            weight=spec.critic_weight,
            past=past,
        )
        self.critic_optimizer.backward(loss / self.random.count)
        self.clock.lap("critic")
        values |= {"critic_loss": loss.item(), "frames": float(made.video.shape[1]), "exit": sum(made.exits) / len(made.exits)}
        values |= {"context_frames": float(context.shape[1]), "window": float(made.window.start)}
        if made.comparisons:
            values |= measure_promotion(spec.memory, made.comparisons) | {"slow_frames": float(len(made.memory.frame_indices()["slow"]))}
        return values

    def _made(self, number: int, group: int) -> tuple[Rollout, Tensor]:
        """The rollout that this step's scores look at."""
        into, rng = number % self.spec.critic_updates, self.random.rng
        if self.spec.rollouts == "each":
            return self._roll_out(number, group)
        if not into:
            self.kept.before = rng.get_state()
            self.kept.made[group] = self._roll_out(number, group)
        elif group not in self.kept.made:  # resumed between two updates of the student, which would make the same again
            now = rng.get_state()
            rng.set_state(self.kept.before)
            self.kept.made[group] = self._roll_out(number - into, group)
            rng.set_state(now)
        return self.kept.made[group]

    def _roll_out(self, number: int, group: int) -> tuple[Rollout, Tensor]:
        """A new video, or with `persist: stream` the next part of the one before, until that is as long as it should be."""
        spec, rng, stream = self.spec, self.random.rng, self.streams.groups[group]
        before, new = stream.made, spec.rollout.window - spec.rollout.skip_first * spec.rollout.chunk
        if before and before.video.shape[1] + new <= stream.frames:
            frames, text = before.video.shape[1] + new, stream.text
        else:
            drawn = self.random.mine(draw_rows(range(len(self.prompts)), spec.batch, self.random))
            before, text = None, self.prompts[drawn].to(self.null)
            frames = spec.horizon.sample_length(number, spec.rollout.chunk, rng)
            if spec.rollout.persist == "stream":
                stream.frames, stream.text, frames = frames, text, spec.rollout.window
        made = rollout(
            self.student, text, frames, self.shape, spec=spec.rollout, memory=spec.memory, flow=self.flow, rng=rng, past=before
        )
        if spec.rollout.persist == "stream":
            stream.made = made
        return made, text

    def shown(self, made: Rollout) -> tuple[Float[Tensor, "B K C H W"], Float[Tensor, "B F C H W"]]:
        """Context and target as the scores see them."""
        seen = self.view.context_frames(made.window.start)
        both = torch.cat([made.video[:, seen], made.video[:, made.window]], dim=1)
        first = [*seen, made.window.start][0]
        if self.spec.teacher.first_latent == "reencode" and first:
            # the scores were trained on videos, whose first latent is that of a picture
            assert self.reencode
            both = torch.cat([self.reencode(made.video[:, : first + 1]), both[:, 1:]], dim=1)
        return both[:, : len(seen)], both[:, len(seen) :]

    def _student_gradient(self, made: Rollout, target: Tensor, context: Tensor, text: Tensor, past: Memory | None) -> dict[str, float]:
        gradient, values = compute_generator_gradient(
            target,
            text,
            real=self.teacher,
            fake=self.critic,
            context=context,
            view=self.view,
            flow=self.flow,
            rng=self.random.rng,
            guidance=self.spec.teacher.guidance,
            guidance_passes=self.spec.teacher.guidance_passes,
            past=past,
            null=self.null,
        )
        self.clock.lap("scores")
        replay_window(self.student, made, gradient, text, backward=lambda loss: self.student_optimizer.backward(loss / self.random.count))
        self.clock.lap("replay")
        return values | {"student_loss": measure_student_loss(made, gradient)}
