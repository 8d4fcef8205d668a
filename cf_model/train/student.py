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
from cf_model.model.memory import MemorySpec, dump, restore
from cf_model.model.rollout import HorizonSpec, Rollout, RolloutSpec, rollout
from cf_model.model.view import TeacherView

from .distill import critic_loss, generator_gradient
from .engine import mine, ranks
from .loop import Average, Optimizer, OptimizerSpec, Random, at_least, batches
from .observe import Clock, remembered, student_loss


@dataclass(frozen=True)
class ScoreSpec:
    """What teacher and critic see of the past, and how strongly the teacher follows the prompt."""

    context: Literal["none", "sparse", "contiguous"]
    guidance: float  # null + guidance (cond - null); Self-Forcing's 3.0 is our 4.0
    mismatch: Literal["refuse", "accept"]  # a context in another layout than the teacher was trained on
    first_latent: Literal["as_is", "reencode"]  # the first frame that they see, where it isn't the video's: as a picture of its own

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
    critic_weight: Literal["uniform", "bell"]
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
        self.memory.hold(chunk)
        if self.horizon.shortest < self.rollout.window:
            raise ValueError(f"horizon.shortest is {self.horizon.shortest}, below rollout.window {self.rollout.window}; use at least that")


class Prompts(Protocol):
    """Embedded prompts, read as they are drawn: a training set's do not fit into memory. A tensor [P, T, E] is one, too."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: list[int], /) -> Tensor: ...


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
        prompts: Prompts,
        null: Float[Tensor, "T E"],
        shape: tuple[int, int, int],
        seed: int,
        reencode: Callable[[Float[Tensor, "B F C H W"]], Float[Tensor, "B 1 C H W"]] | None = None,
    ) -> None:
        """`reencode` makes the last video frame of some latents a picture's latent (`first_latent: reencode`)."""
        device = next(student.parameters()).device
        self.null, self.prompts, self.reencode = null.to(device), prompts, reencode
        self.spec, self.view, self.flow, self.shape = spec, view, flow, shape
        self.student, self.critic, self.teacher = student, critic, teacher.requires_grad_(False)
        updates = spec.steps // spec.critic_updates
        self.student_optimizer = Optimizer(student, spec.student_optimizer, updates)
        self.critic_optimizer = Optimizer(critic, spec.critic_optimizer, spec.steps)
        self.average = Average(student, spec.ema, spec.ema_start)
        self.random = Random(seed, device)
        self.stream = Stream(spec.memory, device)
        self.clock = Clock(device)
        self.seen: dict[str, Tensor] = {}
        if spec.rollout.persist == "stream" and ranks() > 1:
            raise ValueError(f"rollout.persist is stream, whose video lives in one process, but there are {ranks()} ranks; use CF_RANKS=1")

    @property
    def state(self) -> Mapping[str, Any]:
        return {
            "student": self.student,
            "critic": self.critic,
            "average": self.average,
            "student_optimizer": self.student_optimizer,
            "critic_optimizer": self.critic_optimizer,
            "random": self.random,
            "stream": self.stream,
        }

    def step(self, number: int) -> dict[str, float]:
        """One update of the critic; every `critic_updates`-th time one of the student first, on the same rollout."""
        spec, rng = self.spec, self.random.rng
        made, text = self._roll_out(number)
        self.clock.lap("rollout")
        context, target = self.shown(made)
        self.clock.lap("data")
        values: dict[str, float] = {}
        self.seen.update(target=target, context=context, text=text)
        if (number + 1) % spec.critic_updates == 0:
            values |= self._update_student(made, target, context, text)
        loss = critic_loss(
            target, text, fake=self.critic, context=context, view=self.view, flow=self.flow, rng=rng, weight=spec.critic_weight
        )
        loss.backward()
        self.clock.lap("critic")
        values |= {"critic_loss": loss.item(), "critic_gradient": self.critic_optimizer.step()}
        self.clock.lap("update")
        values |= {"frames": float(made.video.shape[1]), "exit": sum(made.exits) / len(made.exits)}
        values |= {"context_frames": float(context.shape[1]), "window": float(made.window.start)}
        if made.compared:
            values |= remembered(spec.memory, made.compared) | {"slow_frames": float(len(made.memory.held()["slow"]))}
        return values

    def _roll_out(self, number: int) -> tuple[Rollout, Tensor]:
        """A new video, or with `persist: stream` the next part of the one before, until that is as long as it should be."""
        spec, rng, before = self.spec, self.random.rng, self.stream.made
        new = spec.rollout.window - spec.rollout.skip_first * spec.rollout.chunk
        if before and before.video.shape[1] + new <= self.stream.frames:
            frames, text = before.video.shape[1] + new, self.stream.text
        else:
            before, text = None, self.prompts[mine(batches(range(len(self.prompts)), spec.batch, self.random))].to(self.null)
            frames = spec.horizon.sample(number, spec.rollout.chunk, rng)
            if spec.rollout.persist == "stream":
                self.stream.frames, self.stream.text, frames = frames, text, spec.rollout.window
            self.clock.lap("data")
        made = rollout(
            self.student, text, frames, self.shape, spec=spec.rollout, memory=spec.memory, flow=self.flow, rng=rng, past=before
        )
        if spec.rollout.persist == "stream":
            self.stream.made = made
        return made, text

    def shown(self, made: Rollout) -> tuple[Float[Tensor, "B K C H W"], Float[Tensor, "B F C H W"]]:
        """Context and target as the scores see them."""
        seen = self.view.frames(made.window.start)
        both = torch.cat([made.video[:, seen], made.video[:, made.window]], dim=1)
        first = [*seen, made.window.start][0]
        if self.spec.teacher.first_latent == "reencode" and first:
            # the scores were trained on videos, whose first latent is that of a picture
            assert self.reencode
            both = torch.cat([self.reencode(made.video[:, : first + 1]), both[:, 1:]], dim=1)
        return both[:, : len(seen)], both[:, len(seen) :]

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
            null=self.null,
        )
        self.clock.lap("scores")
        replay(self.student, made, gradient, text)
        self.clock.lap("replay")
        values |= {"student_loss": student_loss(made, gradient), "student_gradient": self.student_optimizer.step()}
        self.average.update()
        self.clock.lap("update")
        return values | {"ema_distance": self.average.distance()}


class Stream:
    """The video that `persist: stream` goes on with; part of a checkpoint."""

    def __init__(self, spec: MemorySpec, device: torch.device) -> None:
        self.spec, self.device, self.frames, self.text = spec, device, 0, torch.empty(0)
        self.made: Rollout | None = None

    def state_dict(self) -> dict[str, Any]:
        if self.made is None:
            return {}
        return {"frames": self.frames, "text": self.text, "video": self.made.video, "memory": dump(self.made.memory)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.made = None
        if state:
            state = moved(state, self.device)
            self.frames, self.text = state["frames"], state["text"]
            self.made = Rollout(state["video"], slice(0), (), (), restore(self.spec, state["memory"]), ())


def moved(value: Any, device: torch.device) -> Any:
    """Nested dictionaries and lists with their tensors on a device."""
    if isinstance(value, Mapping):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [moved(item, device) for item in value]
    return value.to(device) if isinstance(value, Tensor) else value


def replay(student: Callable[..., Tensor], made: Rollout, gradient: Float[Tensor, "B F C H W"], text: Tensor) -> None:
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
