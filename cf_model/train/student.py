"""Stages 1 and 2: the causal student learns from its own rollouts, scored by a teacher (secs. 3.1, 3.2; alg. 1).

Stage 1 minimises L_local (eq. 3) by the gradient of eq. 4: a window without a context. Stage 2 minimises L_CDMD (eq. 5) by the gradient
of eq. 6: the window that continues a context from the student's own rollout. Both are `DistillationTrainer` with other settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from cf_model.model.denoiser import Denoiser
from cf_model.model.flow import Flow
from cf_model.model.memory import ChunkComparison, Memory, MemorySpec
from cf_model.model.rollout import HorizonSpec, Rollout, RolloutSpec, rollout
from cf_model.model.view import GuidancePasses, TeacherView
from cf_model.train.trainer.batch import average_groups, draw_rows
from cf_model.train.trainer.ema import EMA
from cf_model.train.trainer.engine import PLAIN, EngineSpec, OptimizerSpec, require_at_least
from cf_model.train.trainer.observe import StepTimer, join_comparisons, measure_promotion
from cf_model.train.trainer.ranks import BatchRandom
from cf_model.train.trainer.zero import build_optimizer

from .distill import compute_critic_loss, compute_generator_gradient, measure_student_loss, replay_window
from .past import RolloutStreams


@dataclass(frozen=True)
class ScoreSpec:
    """What teacher and critic see of the past, and how strongly the teacher follows the prompt."""

    context: Literal["none", "sparse", "contiguous"]
    guidance: float  # null + guidance (cond - null); Self-Forcing's 3.0 is our 4.0
    guidance_passes: GuidancePasses  # of the teacher with and without the prompt: one after the other, or as one batch
    mismatch: Literal["refuse", "accept"]  # what to do with a context in another layout than the teacher was trained on
    first_latent: Literal["as_is", "reencode"]  # the first frame that scores see, where it isn't the video's: encoded again as a picture

    def __post_init__(self) -> None:
        require_at_least(1, guidance=self.guidance)


@dataclass(frozen=True)
class StudentSpec:
    """Settings of a distillation stage, 1 or 2. The paper: 600 and 500 iterations of batch 64 (sec. 4)."""

    steps: int  # updates of the critic
    critic_updates: int  # for one update of the student
    rollouts: Literal["each", "shared"]  # a new rollout for each update of the critic, or one until the student's next update
    batch: int
    memory: MemorySpec
    rollout: RolloutSpec
    horizon: HorizonSpec
    teacher: ScoreSpec
    critic_weight: Literal["uniform", "bell"]
    student_optimizer: OptimizerSpec
    critic_optimizer: OptimizerSpec
    ema: float
    ema_start: int  # updates of the student (not of the critic) before the average begins; until then it equals the raw weights
    ema_ramp: bool  # the average's decay after n updates is at most (1 + n) / (10 + n), for short runs
    save_every: int

    def __post_init__(self) -> None:
        require_at_least(1, steps=self.steps, critic_updates=self.critic_updates, batch=self.batch, save_every=self.save_every)
        if self.steps < self.critic_updates:
            raise ValueError(f"steps is {self.steps}, less than critic_updates {self.critic_updates}: the student would never change")
        # Before `ema_start` the average is a copy of the raw weights, so it must begin before training ends.
        chunk = self.rollout.chunk
        if self.ema_start >= self.steps // self.critic_updates:
            updates = self.steps // self.critic_updates
            raise ValueError(f"ema_start is {self.ema_start}, but the student is updated {updates} times; use less")
        for name in ("shortest", "longest"):
            value = getattr(self.horizon, name)
            if value % chunk:
                down = value // chunk * chunk
                raise ValueError(f"horizon.{name} is {value}, not whole chunks of {chunk} latent frames; use {down} or {down + chunk}")
        # A stream changes at every step, so its rollouts can't be shared by several.
        if self.rollouts == "shared" and self.rollout.persist == "stream":
            problem = "rollouts is shared, but rollout.persist is stream, where every step makes the next part of a video"
            raise ValueError(f"{problem}; use rollouts: each, or rollout.persist: fresh")
        # The shortest rollout must at least hold the window (L0 >= l in alg. 1).
        self.memory.check_chunk(chunk)
        if self.horizon.shortest < self.rollout.window:
            raise ValueError(f"horizon.shortest is {self.horizon.shortest}, below rollout.window {self.rollout.window}; use at least that")


class PromptSet(Protocol):
    """Embedded prompts, read as they are drawn because a training set's do not fit into memory. A tensor [P, T, E] satisfies it too."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: list[int], /) -> Tensor: ...


class DistillationTrainer:
    """One distillation (alg. 1): the critic learns at every step, the student at every `critic_updates`-th.

    `student` is G_ϕ, `teacher` s_real, `critic` s_fake. `shape` is C, H, W of a latent frame. `reencode` replaces the last video frame
    of some latents by a picture's latent (`first_latent: reencode`).
    """

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
        device = next(student.parameters()).device
        self.null, self.prompts, self.reencode = null.to(device), prompts, reencode
        self.spec, self.view, self.flow, self.shape = spec, view, flow, shape
        self.steps, self.save_every = spec.steps, spec.save_every
        self.student, self.critic, self.teacher = student, critic, teacher.freeze()
        self.random = BatchRandom(seed, device, batch=spec.batch, groups=engine.count_groups(spec.batch))
        # before build_optimizer, which may split the student over the ranks
        self.ema = EMA(student, spec.ema, spec.ema_start, ramp=spec.ema_ramp)
        self.student_optimizer = build_optimizer(student, spec.student_optimizer, spec.steps // spec.critic_updates, engine)
        self.critic_optimizer = build_optimizer(critic, spec.critic_optimizer, spec.steps, engine)
        self.streams = RolloutStreams(spec.memory, self.random, device)
        # With `rollouts: shared`: group -> the rollout and its prompts [B, T, E] that serve until the student's next update.
        self.shared: dict[int, tuple[Rollout, Tensor]] = {}
        self.comparisons: list[Sequence[ChunkComparison]] = []  # of the step's groups, for the log
        self.timer = StepTimer(device)
        self.newest_batch: dict[str, Tensor] = {}

    @property
    def state(self) -> Mapping[str, Any]:
        """Everything that a step changes, by its name in a checkpoint."""
        return {
            "student": self.student_optimizer.weights,
            "critic": self.critic_optimizer.weights,
            "average": self.ema,
            "student_optimizer": self.student_optimizer,
            "critic_optimizer": self.critic_optimizer,
            "streams": self.streams,
        }

    def step(self, number: int) -> dict[str, float | Tensor]:
        """Run the body of alg. 1's loop once: update the critic, and at every `critic_updates`-th step the student on the same rollout."""
        student_learns = (number + 1) % self.spec.critic_updates == 0
        self.comparisons.clear()
        groups = [self._accumulate_group(number, group, student_learns) for group in self.random.groups(number)]
        values = {name: average_groups([group[name] for group in groups]) for name in groups[0]}
        values |= measure_promotion(self.spec.memory, join_comparisons(self.comparisons))
        # The student's update first; the critic's gradients, of the same rollout, wait.
        if student_learns:
            values["student_gradient"] = self.student_optimizer.step()
            values["ema_distance"] = self.ema.update()
            self.shared.clear()
        values["critic_gradient"] = self.critic_optimizer.step()
        self.timer.lap("update")
        return values

    def _accumulate_group(self, number: int, group: int, student_learns: bool) -> dict[str, float | Tensor]:
        """Add the gradients of one group of the batch: the critic's, and the student's where it learns. Return the group's values."""
        spec = self.spec
        # Lines 5 to 28: a prompt, a rollout X of the student, without gradient.
        generated, text = self._get_rollout(number, group)
        self.timer.lap("rollout")
        # Line 29: the context v_c, [B, K, C, H, W], and the window that it is scored after, [B, F, C, H, W].
        context, target = self.split_rollout(generated)
        self.timer.lap("data")
        self.newest_batch |= self.random.label(target=target, context=context, text=text)
        # The critic's keys and values of the context serve both updates, because the student's update does not change the critic.
        past = self.view.read_context(self.critic, text, context)
        # Line 30: the contextual DMD loss (eq. 6; eq. 4 without a context).
        values = self._accumulate_student_gradient(generated, target, context, text, past) if student_learns else {}
        # DMD: the critic is trained on the student's frames, so that s_fake stays the score of what the student makes.
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
        self.timer.lap("critic")
        return values | {"critic_loss": loss.detach()} | self._describe_rollout(generated, context)

    def _describe_rollout(self, generated: Rollout, context: Tensor) -> dict[str, float | Tensor]:
        """Return a rollout's length, exit level, context, window, and what its memory promoted, for the log."""
        values: dict[str, float | Tensor] = {"frames": float(generated.video.shape[1])}
        values["exit"] = sum(generated.exits) / len(generated.exits)
        values |= {"context_frames": float(context.shape[1]), "window": float(generated.window.start)}
        self.comparisons.append(generated.comparisons)
        if generated.comparisons:
            values["slow_frames"] = generated.memory.count_slow()
        return values

    def _get_rollout(self, number: int, group: int) -> tuple[Rollout, Tensor]:
        """Return this step's rollout and its prompts: a new rollout, or with `rollouts: shared` that of the student's last update."""
        since_update, now = number % self.spec.critic_updates, self.random.rng
        if self.spec.rollouts == "each":
            return self._roll_out(number, group)
        if not since_update:
            self.shared[group] = self._roll_out(number, group)
        elif group not in self.shared:
            # Resumed between two updates of the student: the unchanged student makes the same rollout from that step's random numbers.
            self.random.rng = self.random.draw_step(number - since_update)
            self.shared[group] = self._roll_out(number - since_update, group)
            self.random.rng = now
        return self.shared[group]

    def _roll_out(self, number: int, group: int) -> tuple[Rollout, Tensor]:
        """Generate a new video (alg. 1, lines 5 to 28), or with `persist: stream` the next part of a video that is not finished."""
        spec, rng, stream = self.spec, self.random.rng, self.streams.groups[group]
        # A stream's windows overlap by the `skip_first` chunks that carry no gradient.
        before, new = stream.newest, spec.rollout.window - spec.rollout.skip_first * spec.rollout.chunk
        if before and before.video.shape[1] + new <= stream.frames:
            frames, text = before.video.shape[1] + new, stream.text
        else:
            # Line 5: sample a prompt p ~ D for each video; [B, T, E].
            drawn = self.random.take_own(draw_rows(range(len(self.prompts)), spec.batch, self.random))
            before, text = None, self.prompts[drawn].to(self.null)
            # Line 6: sample the rollout length L, whose maximum grows with the step (long self-rollout curriculum, sec. 3.2).
            frames = spec.horizon.sample_length(number, spec.rollout.chunk, rng)
            if spec.rollout.persist == "stream":
                stream.frames, stream.text, frames = frames, text, spec.rollout.window
        # Lines 7 to 28: the random exit r, and chunk after chunk from noise with the memory C of sec. 3.3.
        generated = rollout(
            self.student,
            text,
            frames,
            self.shape,
            spec=spec.rollout,
            memory=spec.memory,
            flow=self.flow,
            rng=rng,
            past=before,
        )
        if spec.rollout.persist == "stream":
            stream.newest = generated
        return generated, text

    def split_rollout(self, generated: Rollout) -> tuple[Float[Tensor, "B K C H W"], Float[Tensor, "B F C H W"]]:
        """Split a rollout into the context and the target window, as both scores see them (alg. 1, line 29)."""
        frames = self.view.context_frames(generated.window.start)
        both = torch.cat([generated.video[:, frames], generated.video[:, generated.window]], dim=1)
        first = [*frames, generated.window.start][0]
        if self.spec.teacher.first_latent == "reencode" and first:
            # The scores were trained on videos, whose first latent encodes a single picture; here a later latent comes first.
            assert self.reencode
            both = torch.cat([self.reencode(generated.video[:, : first + 1]), both[:, 1:]], dim=1)
        return both[:, : len(frames)], both[:, len(frames) :]

    def _accumulate_student_gradient(
        self, generated: Rollout, target: Tensor, context: Tensor, text: Tensor, past: Memory | None
    ) -> dict[str, float | Tensor]:
        """Add the student's gradient for one rollout: the scores' difference (eq. 6), then ∂G/∂θ by replaying the window's chunks."""
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
        self.timer.lap("scores")

        def backward(loss: Tensor) -> None:
            self.student_optimizer.backward(loss / self.random.count)

        replay_window(self.student, generated, gradient, text, backward=backward)
        self.timer.lap("replay")
        return {**values, "student_loss": measure_student_loss(generated, gradient)}
