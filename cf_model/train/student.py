"""Stages 1 and 2: the causal student learns from its own rollouts, scored by a teacher (secs. 3.1, 3.2; alg. 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from cf_model.model.denoiser import Denoiser
from cf_model.model.flow import Flow
from cf_model.model.memory import MemorySpec
from cf_model.model.rollout import HorizonSpec, Rollout, RolloutSpec, rollout
from cf_model.model.view import TeacherView

from .distill import critic_loss, generator_gradient
from .loop import Average, Optimizer, OptimizerSpec, Random, at_least, batches


@dataclass(frozen=True)
class ScoreSpec:
    """What teacher and critic see of the past, and how strongly the teacher follows the prompt."""

    context: Literal["none", "sparse", "contiguous"]
    guidance: float  # null + guidance (cond - null); Self-Forcing's 3.0 is our 4.0

    def __post_init__(self) -> None:
        at_least(1, guidance=self.guidance)


@dataclass(frozen=True)
class StudentSpec:
    """One distillation stage. Stage 1 and stage 2 are two of these."""

    steps: int  # updates of the critic
    critic_updates: int  # for one of the student
    batch: int
    memory: MemorySpec
    rollout: RolloutSpec
    horizon: HorizonSpec
    teacher: ScoreSpec
    student_optimizer: OptimizerSpec
    critic_optimizer: OptimizerSpec
    ema: float
    ema_start: int  # updates of the student before the average begins
    save_every: int

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, critic_updates=self.critic_updates, batch=self.batch, save_every=self.save_every)
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
        if self.horizon.shortest < self.rollout.window:
            raise ValueError(f"horizon.shortest is {self.horizon.shortest}, below rollout.window {self.rollout.window}; use at least that")


class Distillation:
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
        prompts: Float[Tensor, "P T E"],
        shape: tuple[int, int, int],
        seed: int,
    ) -> None:
        self.spec, self.view, self.flow, self.prompts, self.shape = spec, view, flow, prompts, shape
        self.student, self.critic, self.teacher = student, critic, teacher.requires_grad_(False)
        updates = spec.steps // spec.critic_updates
        self.student_optimizer = Optimizer(student, spec.student_optimizer, updates)
        self.critic_optimizer = Optimizer(critic, spec.critic_optimizer, spec.steps)
        self.average = Average(student, spec.ema, spec.ema_start)
        self.random = Random(seed)

    @property
    def state(self) -> Mapping[str, Any]:
        return {
            "student": self.student,
            "critic": self.critic,
            "average": self.average,
            "student_optimizer": self.student_optimizer,
            "critic_optimizer": self.critic_optimizer,
            "random": self.random,
        }

    def step(self, number: int) -> dict[str, float]:
        """One update of the critic; every `critic_updates`-th time one of the student first, on the same rollout."""
        spec, rng = self.spec, self.random.rng
        text = self.prompts[batches(range(len(self.prompts)), spec.batch, self.random)]
        frames = spec.horizon.sample(number, spec.rollout.chunk, rng)
        made = rollout(self.student, text, frames, self.shape, spec=spec.rollout, memory=spec.memory, flow=self.flow, rng=rng)
        target = made.video[:, made.window]
        context = made.video[:, self.view.frames(made.window.start)]
        values: dict[str, float] = {}
        if (number + 1) % spec.critic_updates == 0:
            values |= self._update_student(made, target, context, text)
        loss = critic_loss(target, text, fake=self.critic, context=context, view=self.view, flow=self.flow, rng=rng)
        loss.backward()
        values |= {"critic_loss": loss.item(), "critic_gradient": self.critic_optimizer.step()}
        values |= {"frames": float(frames), "exit": float(made.exit), "context_frames": float(context.shape[1])}
        if made.similarities:
            values["similarity"] = sum(made.similarities) / len(made.similarities)
            values["slow_frames"] = float(len(made.memory.slow))
        return values

    def _update_student(self, made: Rollout, target: Tensor, context: Tensor, text: Tensor) -> dict[str, float]:
        gradient, values = generator_gradient(
            target,
            text,
            real=self.teacher,
            fake=self.critic,
            context=context,
            view=self.view,
            flow=self.flow,
            rng=self.random.rng,
            guidance=self.spec.teacher.guidance,
        )
        replay(self.student, made, gradient, text)
        values["student_gradient"] = self.student_optimizer.step()
        self.average.update()
        return values


def replay(student: Denoiser, made: Rollout, gradient: Float[Tensor, "B F C H W"], text: Tensor) -> None:
    """Back-propagates `gradient` of 0.5 mse(x, (x - gradient).detach()) into the student, one chunk at a time.

    Each scored chunk's last pass is run again with a graph, against the memory it had, which is constant. So the
    gradient stops exactly at the context, and memory is that of one chunk however long the rollout was.
    """
    carry = [target for target in made.targets if target.grad]
    numbers = sum(target.x_t.numel() for target in carry)
    for target in carry:
        at = target.first - made.window.start
        sigma = target.x_t.new_full((len(target.x_t),), target.sigma)
        x_0 = student(target.x_t, sigma, text, target.memory)
        (x_0 * gradient[:, at : at + x_0.shape[1]]).sum().div(numbers).backward()
