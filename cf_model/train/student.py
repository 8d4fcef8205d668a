"""Stages 1 and 2: the causal student learns from its own rollouts, scored by a teacher (secs. 3.1, 3.2; alg. 1).

Stage 1 minimises L_local (eq. 3) by the gradient of eq. 4: a window without a context. Stage 2 minimises L_CDMD (eq. 5) by the gradient
of eq. 6: the window that continues a context from the student's own rollout. Both are `DistillationTrainer` with other settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cf_model.model.context import HeldFrames, list_held_frames
from cf_model.model.denoiser import Denoiser
from cf_model.model.flow import Flow
from cf_model.model.memory import ChunkComparison, Memory, MemorySpec
from cf_model.model.rollout import HorizonSpec, Rollout, RolloutSpec, rollout
from cf_model.model.view import GuidancePasses, TeacherView
from cf_model.train.trainer.batch import EncodedClips, PromptSet, average_groups, draw_rows
from cf_model.train.trainer.ema import EMA
from cf_model.train.trainer.engine import PLAIN, EngineSpec, OptimizerSpec, require_at_least
from cf_model.train.trainer.observe import StepTimer, join_comparisons, measure_promotion
from cf_model.train.trainer.ranks import BatchRandom
from cf_model.train.trainer.zero import build_optimizer

from .distill import compute_critic_loss, compute_generator_gradient, measure_student_loss, replay_window
from .layout import TeacherLayout
from .past import RolloutStreams


@dataclass(frozen=True)
class ScoreSpec:
    """What teacher and critic see of the past, and how strongly the teacher follows the prompt."""

    context: Literal["none", "memory", "sparse", "contiguous"]
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
    critic_warmup: int  # steps before the student's first update, in which the critic gets to know the student
    # a new rollout for each update of the critic, which the student's update of that step shares; one until the student's next update;
    # or each, and one of its own for the student's update (Self-Forcing)
    rollouts: Literal["each", "shared", "own"]
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
        if self.critic_warmup < 0:
            raise ValueError(f"critic_warmup is {self.critic_warmup}; use at least 0")
        if self.student_updates < 1:
            problem = f"steps is {self.steps}, critic_updates {self.critic_updates}, critic_warmup {self.critic_warmup}"
            raise ValueError(f"{problem}: the student would never change; use more steps")
        # Before `ema_start` the average is a copy of the raw weights, so it must begin before training ends.
        chunk = self.rollout.chunk
        if self.ema_start >= self.student_updates:
            raise ValueError(f"ema_start is {self.ema_start}, but the student is updated {self.student_updates} times; use less")
        for name in ("shortest", "longest"):
            value = getattr(self.horizon, name)
            if value % chunk:
                down = value // chunk * chunk
                raise ValueError(f"horizon.{name} is {value}, not whole chunks of {chunk} latent frames; use {down} or {down + chunk}")
        # A stream changes at every step, so its rollouts can't be shared by several.
        if self.rollouts == "shared" and self.rollout.persist == "stream":
            problem = "rollouts is shared, but rollout.persist is stream, where every step makes the next part of a video"
            raise ValueError(f"{problem}; use rollouts: each, or rollout.persist: fresh")
        if self.teacher.context == "memory":
            self._check_shown_memory()
        # The shortest rollout must at least hold the window (L0 >= l in alg. 1).
        self.memory.check_chunk(chunk)
        if self.horizon.shortest < self.rollout.window:
            raise ValueError(f"horizon.shortest is {self.horizon.shortest}, below rollout.window {self.rollout.window}; use at least that")

    def _check_shown_memory(self) -> None:
        """Raise ValueError where the frames that the student remembers cannot be a teacher's context."""
        if self.rollout.persist == "stream":
            problem = "teacher.context is memory, but rollout.persist is stream, whose windows begin before what the memory holds by then"
            raise ValueError(f"{problem}; use teacher.context: sparse, or rollout.persist: fresh")
        if self.teacher.first_latent == "reencode":
            problem = "teacher.first_latent is reencode, but teacher.context is memory, which holds the video's own first frame"
            raise ValueError(f"{problem}; use first_latent: as_is")
        for name, drawn in (("keep", "first"), ("when", "evict"), ("fill", "none")):
            if getattr(self.memory, name) != drawn:
                problem = f"memory.{name} is {getattr(self.memory, name)}, but teacher.context is memory, which knows {drawn} alone"
                raise ValueError(f"{problem}; use memory.{name}: {drawn}, or teacher.context: sparse")

    def want_layout(self, view: TeacherView) -> TeacherLayout:
        """Return what a teacher must have been trained on to score this student; `view` is the teacher's as params.yaml states it."""
        wanted = replace(view, context=self.teacher.context)
        if wanted.context == "memory":
            memory, chunk = self.memory, self.rollout.chunk
            wanted = replace(wanted, sink=memory.sink, slow=memory.slow, fast=memory.fast, stride=memory.interval * chunk, chunk=chunk)
        return TeacherLayout(wanted, self.rollout.window, self.horizon.longest - self.rollout.window)

    @property
    def student_updates(self) -> int:
        """Number of the student's updates: one in `critic_updates` steps, none in the critic's warm-up."""
        return self.steps // self.critic_updates - self.critic_warmup // self.critic_updates

    def student_learns(self, step: int) -> bool:
        """Whether the student is updated in this step, counted from 0."""
        return (step + 1) % self.critic_updates == 0 and step >= self.critic_warmup

    def real_chance(self, step: int) -> float:
        """Return the chance that this step's rollout continues a training clip instead of the student's own video.

        # Choice: with `begin: share` it falls steadily from 1 to 0, because the critic can't follow if all contexts change at once.
        """
        return {"own": 0.0, "real": 1.0, "share": 1 - step / self.steps, "mixed": 1.0}[self.rollout.begin]


class DistillationTrainer:
    """One distillation (alg. 1): the critic learns at every step, the student at every `critic_updates`-th after `critic_warmup`.

    `student` is G_ϕ, `teacher` s_real, `critic` s_fake. `shape` is C, H, W of a latent frame. `reencode` replaces the last video frame
    of some latents by a picture's latent (`first_latent: reencode`). `clips` are those that a rollout may continue (`rollout.begin`);
    raises ValueError where none is long enough.
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
        clips: EncodedClips | None = None,
        engine: EngineSpec = PLAIN,
    ) -> None:
        device = next(student.parameters()).device
        self.null, self.prompts, self.reencode, self.clips = null.to(device), prompts, reencode, clips
        if spec.rollout.begin != "own":
            assert clips, "rollouts that continue clips need some"
            clips.rows("train", spec.horizon.longest - spec.rollout.window)  # refuses clips that are too short
        self.spec, self.view, self.flow, self.shape = spec, view, flow, shape
        self.steps, self.save_every = spec.steps, spec.save_every
        self.student, self.critic, self.teacher = student, critic, teacher.freeze()
        self.random = BatchRandom(seed, device, batch=spec.batch, groups=engine.count_groups(spec.batch))
        # before build_optimizer, which may split the student over the ranks
        self.ema = EMA(student, spec.ema, spec.ema_start, ramp=spec.ema_ramp)
        self.student_optimizer = build_optimizer(student, spec.student_optimizer, spec.student_updates, engine)
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
        """Run the body of alg. 1's loop once: update the critic, and at every `critic_updates`-th step the student first."""
        learns, own = self.spec.student_learns(number), self.spec.rollouts == "own"
        values = dict[str, float | Tensor]()
        # With a rollout of its own the student is updated before the critic's rollout is made, as in Self-Forcing.
        if learns and own:
            values |= self._accumulate(number, number, student=True, critic=False) | self._update_student()
        # That second rollout takes its random numbers from behind the last step's.
        values |= self._accumulate(number, number + self.steps * (learns and own), student=learns and not own, critic=True)
        # Else the critic's gradients, of the same rollout, wait.
        if learns and not own:
            values |= self._update_student()
        values["critic_gradient"] = self.critic_optimizer.step()
        self.timer.lap("update")
        return values

    def _update_student(self) -> dict[str, float | Tensor]:
        """Update the student and its average. Return the gradient's norm and the average's distance."""
        values: dict[str, float | Tensor] = {"student_gradient": self.student_optimizer.step(), "ema_distance": self.ema.update()}
        self.shared.clear()
        self.timer.lap("update")
        return values

    def _accumulate(self, number: int, numbers: int, *, student: bool, critic: bool) -> dict[str, float | Tensor]:
        """Add a batch's gradients, group by group, to those of the named models; `numbers` names its random numbers. Return its values."""
        self.comparisons.clear()
        groups = [self._accumulate_group(number, group, student, critic) for group in self.random.groups(numbers)]
        values = {name: average_groups([group[name] for group in groups]) for name in groups[0]}
        return values | measure_promotion(self.spec.memory, join_comparisons(self.comparisons))

    def _accumulate_group(self, number: int, group: int, student: bool, critic: bool) -> dict[str, float | Tensor]:
        """Add the gradients of one group of the batch, to the student's and to the critic's. Return the group's values."""
        spec = self.spec
        # Lines 5 to 28: a prompt, a rollout X of the student, without gradient.
        generated, text = self._get_rollout(number, group)
        self.timer.lap("rollout")
        # Line 29: the context v_c, [B, K, C, H, W], and the window that it is scored after, [B, F, C, H, W].
        shown = self.find_context(generated)
        context, target = self.split_rollout(generated, shown)
        self.timer.lap("data")
        self.newest_batch |= self.random.label(target=target, context=context, text=text)
        # The critic's keys and values of the context serve both updates, because the student's update does not change the critic.
        past = self.view.read_context(self.critic, text, context, shown.filled)
        # Line 30: the contextual DMD loss (eq. 6; eq. 4 without a context).
        values = self._accumulate_student_gradient(generated, target, context, shown.filled, text, past) if student else {}
        if not critic:
            return values | self._describe_rollout(generated, shown)
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
            filled=shown.filled,
        )
        self.critic_optimizer.backward(loss / self.random.count)
        self.timer.lap("critic")
        return values | {"critic_loss": loss.detach()} | self._describe_rollout(generated, shown)

    def _describe_rollout(self, generated: Rollout, shown: HeldFrames) -> dict[str, float | Tensor]:
        """Return a rollout's length, exit level, context, window, and what its memory promoted, for the log."""
        values: dict[str, float | Tensor] = {"frames": float(generated.video.shape[1])}
        values["exit"] = sum(generated.exits) / len(generated.exits)
        values |= {"context_frames": shown.mean_count, "window": float(generated.window.start)}
        self.comparisons.append(generated.comparisons)
        if generated.comparisons:
            values["slow_frames"] = generated.memory.count_slow()
        return values

    def _get_rollout(self, number: int, group: int) -> tuple[Rollout, Tensor]:
        """Return this step's rollout and its prompts: a new rollout, or with `rollouts: shared` that of the student's last update."""
        since_update, now = number % self.spec.critic_updates, self.random.rng
        if self.spec.rollouts != "shared":
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
        if spec.rollout.begin != "own" and self.random.coin(spec.real_chance(number)):
            return self._continue_clip(number)
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

    def _continue_clip(self, number: int) -> tuple[Rollout, Tensor]:
        """Generate what follows a training clip's beginning, which the student's memory has read: a real context (`begin`).

        The clip ends where the window begins; with `begin: mixed` anywhere before, and the frames between are the student's own.

        # Choice: every length of the clip is as likely. Its start teaches recall, because only a real past holds what is worth it; the
        # student's frames after it teach to go on from its own errors, where one that saw real ones alone lets the camera stand still.
        """
        spec, rng = self.spec, self.random.rng
        assert self.clips
        length = spec.horizon.sample_length(number, spec.rollout.chunk, rng)
        before = length - spec.rollout.window
        if spec.rollout.begin == "mixed":
            before = spec.rollout.chunk * self.random.integers(0, before // spec.rollout.chunk, 1)[0]
        rows = self.random.take_own(draw_rows(self.clips.rows("train", before), spec.batch, self.random))
        text = self.clips.text(rows).to(self.null)
        real = self.clips.window(rows, [0] * len(rows), before).to(self.null)
        past = None
        if before:
            memory = self.student.remember_clip(real, text, spec.memory, chunk=spec.rollout.chunk)
            past = Rollout(real, slice(0), (), (), memory, (), None)
        generated = rollout(
            self.student, text, length, self.shape, spec=spec.rollout, memory=spec.memory, flow=self.flow, rng=rng, past=past
        )
        return generated, text

    def find_context(self, generated: Rollout) -> HeldFrames:
        """Return which frames of a rollout both scores see before its window: what each video's memory held then, or the view's."""
        if self.view.context == "memory":
            assert generated.held
            return generated.held
        return list_held_frames(self.view.context_frames(generated.window.start))

    def split_rollout(self, generated: Rollout, shown: HeldFrames) -> tuple[Float[Tensor, "B K C H W"], Float[Tensor, "B F C H W"]]:
        """Split a rollout into the context and the target window, as both scores see them (alg. 1, line 29)."""
        context, target = shown.cut(generated.video), generated.video[:, generated.window]
        if self.spec.teacher.first_latent == "as_is":
            return context, target
        # The scores were trained on videos, whose first latent encodes a single picture; here a later latent may come first.
        assert self.reencode
        if first := [*self.view.context_frames(generated.window.start), generated.window.start][0]:
            both = torch.cat([self.reencode(generated.video[:, : first + 1]), torch.cat([context, target], dim=1)[:, 1:]], dim=1)
            context, target = both[:, : context.shape[1]], both[:, context.shape[1] :]
        return context, target

    def _accumulate_student_gradient(
        self, generated: Rollout, target: Tensor, context: Tensor, filled: Tensor | None, text: Tensor, past: Memory | None
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
            filled=filled,
            null=self.null,
        )
        self.timer.lap("scores")

        def backward(loss: Tensor) -> None:
            self.student_optimizer.backward(loss / self.random.count)

        replay_window(self.student, generated, gradient, text, backward=backward)
        self.timer.lap("replay")
        return {**values, "student_loss": measure_student_loss(generated, gradient)}
