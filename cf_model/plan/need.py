"""What a training stage needs before it starts: its training state, memory and operations, from its settings alone.

Everything that chance decides in a step is averaged where it costs operations (exit levels, rollout lengths, windows) and
taken at its largest where it costs memory. Wherever `promote` decides by content, every chunk that is tested counts as news.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cf_model.model.view import TeacherView
from cf_model.train.base import BaseSpec
from cf_model.train.causal_init import CausalInitSpec
from cf_model.train.student import StudentSpec
from cf_model.train.teacher import TeacherSpec
from cf_model.train.trainer.engine import OptimizerSpec

from .cost import Costs
from .passes import Tally, lengths, remembered, rolling, scored, starts

ZERO = (0, 1, 2, 3)


@dataclass(frozen=True)
class Need:
    """Of one training stage; bytes of what scales with the batch are of one sample."""

    steps: int
    batch: int
    trained: int  # parameters
    frozen: int
    averaged: int
    moments: int  # bytes of the optimisers' own state
    copies: int  # bytes of the weights that products are computed with, where those aren't the trained ones
    operations: float  # of one sample in one step, the mean over all steps
    memory: int  # keys and values
    activations: int  # at the pass that keeps most
    latents: int  # the longest video of a step
    shared: int  # bytes whatever the batch: the bank of errors
    kept: int  # bytes of a rollout that outlives its step: of every sample of a rank's share, computed at once or not

    def states(self, zero: int = 0, ranks: int = 1, *, offload: bool = False) -> dict[str, float]:
        """Bytes a rank by ZeRO stage, as zero.py has them: 1 splits moments and master weights among the ranks, 2 the gradients
        too, 3 the weights too. The average, a frozen teacher and what products are computed with are whole on every rank."""
        share = [ranks if zero >= least else 1 for least in ZERO]
        trained = 4 * self.trained
        return {
            "weights": trained / share[3] + self.copies + 4 * self.frozen,
            "gradients": trained / share[2],
            "optimiser": 0.0 if offload else (self.moments + (trained if zero else 0)) / share[1],
            "average": 4 * self.averaged,
        }

    def sample(self) -> int:
        """Bytes that one more sample at once takes."""
        return self.memory + self.activations + self.latents

    def peak(self, at_once: int, zero: int = 0, ranks: int = 1, *, offload: bool = False) -> float:
        later = max(0, self.batch // ranks - at_once) * self.kept
        return sum(self.states(zero, ranks, offload=offload).values()) + at_once * self.sample() + later + self.shared

    @property
    def checkpoint(self) -> int:
        return 4 * (self.trained + self.averaged) + self.moments + self.shared

    @property
    def total(self) -> float:
        """Operations of the whole stage."""
        return self.operations * self.batch * self.steps


def moments(costs: Costs, optimizer: OptimizerSpec) -> int:
    """Two numbers a parameter with AdamW, one where Muon trains it."""
    return 8 * costs.parameters - (4 * costs.matrices if optimizer.muon_lr else 0)


def copies(costs: Costs, networks: int) -> int:
    return networks * 2 * costs.parameters if costs.number == 2 else 0


def latents(costs: Costs, frames: int) -> int:
    return 4 * frames * costs.channels * costs.height * costs.width


def of_base(spec: BaseSpec, costs: Costs) -> Need:
    return Need(
        steps=spec.steps,
        batch=spec.batch,
        trained=costs.parameters,
        frozen=0,
        averaged=costs.parameters,
        moments=moments(costs, spec.optimizer),
        copies=copies(costs, 1),
        operations=costs.forward(spec.window).trained(costs.compute.checkpointing),
        memory=0,
        activations=costs.activations(spec.window),
        latents=latents(costs, spec.window),
        shared=0,
        kept=0,
    )


# ---------------------------------------------------------------------------------------------------------- teacher


def of_teacher(spec: TeacherSpec, costs: Costs) -> Need:
    pasts = range(spec.shortest, spec.longest + 1)
    share = (1 - spec.no_context) / len(pasts)
    contexts = Tally({0: spec.no_context})
    for view, part in ((spec.view, 1 - spec.fast_only), (replace(spec.view, sink=0, slow=0), spec.fast_only)):
        for start in pasts:
            contexts.add(len(view.context_frames(start)), share * part)
    passes = {seen: scored(costs, spec.view, spec.target, seen) for seen in contexts.shares}
    return replace(
        of_base(BaseSpec("scratch", None, spec.steps, spec.batch, 1, spec.dropout, spec.optimizer, spec.ema, spec.save_every), costs),
        operations=sum(part * passes[seen].trained for seen, part in contexts.shares.items()),
        memory=2 * max(one.remembered for one in passes.values()),  # and their gradients
        activations=max(one.activations for one in passes.values()),
        latents=latents(costs, spec.longest + spec.target),
        shared=2 * spec.errors.grids * spec.errors.per_grid * latents(costs, spec.target),
        kept=0,
    )


# ---------------------------------------------------------------------------------------------------- causal models


def of_causal_init(spec: CausalInitSpec, costs: Costs) -> Need:
    """Every chunk is denoised, and remembered with gradient; one graph holds all of them.

    `method: ode` is counted as the same passes; the trajectories it needs are not counted."""
    chunks, ahead = spec.frames // spec.chunk, spec.longest // spec.chunk
    seen = [one for one, _ in zip(remembered(spec.memory, spec.chunk), range(ahead + chunks), strict=False)]
    checkpointing = costs.compute.checkpointing
    watched = [costs.forward(spec.chunk, one.committing).total for one in seen]
    learned = [
        sum(costs.forward(spec.chunk, past).trained(checkpointing) for past in (one.denoising, one.committing)) for one in seen
    ]
    after = [sum(watched[:past]) + sum(learned[past : past + chunks]) for past in range(ahead + 1)]
    # of a pass that only remembers, the last block's keys and values are all that the graph reaches
    last = costs.block(spec.chunk) + costs.ends(spec.chunk) if not checkpointing else 0
    kept = [
        sum(costs.kept(spec.chunk, one.denoising) + costs.kept(spec.chunk, one.committing) - last for one in seen[past : past + chunks])
        for past in (0, ahead)
    ]
    return replace(
        of_base(BaseSpec("scratch", None, spec.steps, spec.batch, 1, spec.dropout, spec.optimizer, spec.ema, spec.save_every), costs),
        operations=spec.begin * after[0] + (1 - spec.begin) * sum(after) / len(after),
        memory=2 * max(len(one.alive) for one in seen) * costs.memory_frame(),  # and their gradients
        activations=max(kept) + costs.live(spec.chunk, seen[-1].denoising),
        latents=latents(costs, spec.longest + spec.frames),
    )


def of_student(spec: StudentSpec, costs: Costs, view: TeacherView) -> Need:
    """A rollout and an update of the critic at every step; at every `critic_updates`-th the student's: teacher (twice with
    guidance) and critic look at the window, then its chunks are replayed with gradient (docs/performance.md 4.2). A context
    with a pass of its own is read by the critic once a step, and by the teacher once a prompt."""
    roll = spec.rollout
    view = replace(view, context=spec.teacher.context)
    windows = Tally({})
    for frames, often in lengths(spec.horizon, roll.chunk, spec.steps).items():
        for start, share in starts(frames, roll).items():
            windows.add(start, often * share)
    longest = max(windows.shares) + roll.window
    seen = [one for one, _ in zip(remembered(spec.memory, roll.chunk), range(longest // roll.chunk), strict=False)]
    student = {start: rolling(spec, costs, seen, start) for start in windows.shares}
    passes = {start: scored(costs, view, roll.window, len(view.context_frames(start))) for start in windows.shares}
    operations, prompts = 0.0, 1 if spec.teacher.guidance == 1 else 2
    for start, often in windows.shares.items():
        score = passes[start]
        update = (prompts + 1) * score.look + prompts * score.read + student[start].replay
        operations += often * (student[start].rollout + score.trained + update / spec.critic_updates)
    alive = max(one.alive for one in student.values())
    outlives = spec.rollouts == "shared" or roll.persist == "stream"
    replayed = max(costs.activations(roll.chunk, one.denoising) for one in seen)
    return Need(
        steps=spec.steps,
        batch=spec.batch,
        trained=2 * costs.parameters,
        frozen=costs.parameters,
        averaged=costs.parameters,
        moments=moments(costs, spec.student_optimizer) + moments(costs, spec.critic_optimizer),
        copies=copies(costs, 2),
        operations=operations,
        memory=alive * costs.memory_frame() + 2 * max(one.remembered for one in passes.values()),
        # what the critic has read waits, with its graph, while the teacher looks and the student's chunks are replayed
        activations=max(max(one.activations, one.kept + max(replayed, prompts * one.remembered)) for one in passes.values()),
        latents=latents(costs, longest + 3 * roll.window),
        shared=0,
        kept=alive * costs.memory_frame() + latents(costs, longest) if outlives else 0,
    )
