"""Estimate what a training stage needs before it starts: training state, memory and operations, from its settings alone.

What chance decides in a step (exit levels, rollout lengths, windows) counts with its mean in operations, and with its largest value in
memory. Where `promote` decides by content, every chunk that is tested counts as news.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice

from cf_model.model.view import TeacherView
from cf_model.train.base import BaseSpec
from cf_model.train.causal_init import CausalInitSpec
from cf_model.train.student import StudentSpec
from cf_model.train.teacher import TeacherSpec
from cf_model.train.trainer.engine import OptimizerSpec

from .cost import ModelCosts
from .passes import Tally, cost_rollout, plan_scoring, tally_lengths, tally_starts, trace_memory

ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class StageNeed:
    """Needs of one training stage. What scales with the batch is stated in bytes of one sample."""

    steps: int
    batch: int
    trained: int  # parameters
    frozen: int  # bytes of frozen weights
    averaged: int  # parameters in the moving average
    moments: int  # bytes of the optimisers' own state
    copies: int  # bytes of bfloat16 weights for matrix products; 0 where products use the trained weights
    operations: float  # of one sample in one step, the mean over all steps
    memory: int  # keys and values
    activations: int  # of the pass that saves most
    latents: int  # of the longest video of a step
    shared: int  # bytes that do not depend on the batch: the error bank
    carried: int  # bytes per sample of rollouts carried over to the next step, of a rank's whole share of the batch

    def states(self, zero: int = 0, ranks: int = 1, *, offload: bool = False) -> dict[str, float]:
        """Count the bytes of the training state on one rank for a ZeRO stage (zero.py).

        Stage 1 splits moments and master weights among the ranks, 2 the averaged gradients too, 3 the weights too. The average, a
        frozen teacher and the weights for matrix products are whole on every rank, and so is with stage 2 a rank's own gradient,
        which is summed over chunks and groups before it is averaged.
        """
        share = [ranks if zero >= stage else 1 for stage in ZERO_STAGES]  # by how many ranks a part of that stage is divided
        trained = 4 * self.trained
        return {
            "weights": trained / share[3] + self.copies + self.frozen,
            "gradients": trained / share[3],
            "optimiser": 0.0 if offload else (self.moments + (trained if zero else 0)) / share[1],
            "average": 4 * self.averaged,
        }

    def sample_bytes(self) -> int:
        """Count the bytes of one more sample computed at once."""
        return self.memory + self.activations + self.latents

    def peak(self, at_once: int, zero: int = 0, ranks: int = 1, *, offload: bool = False) -> float:
        """Count the bytes of a rank's peak when it computes `at_once` samples together."""
        carried = max(0, self.batch // ranks - at_once) * self.carried
        return sum(self.states(zero, ranks, offload=offload).values()) + at_once * self.sample_bytes() + carried + self.shared

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint."""
        return 4 * (self.trained + self.averaged) + self.moments + self.shared

    @property
    def total(self) -> float:
        """Operations of the whole stage."""
        return self.operations * self.batch * self.steps


def count_moment_bytes(costs: ModelCosts, optimizer: OptimizerSpec) -> int:
    """Count the bytes of the optimiser's moments: two numbers a parameter with AdamW, one with Muon."""
    return 8 * costs.parameters - (4 * costs.matrices if optimizer.muon_lr else 0)


def count_copy_bytes(costs: ModelCosts, networks: int) -> int:
    """Count the bytes of bfloat16 copies of the weights of `networks` trained networks; 0 where products are in float32."""
    return networks * 2 * costs.parameters if costs.number_bytes == 2 else 0


def count_latent_bytes(costs: ModelCosts, frames: int) -> int:
    """Count the bytes of `frames` latent frames in float32."""
    return 4 * frames * costs.channels * costs.height * costs.width


def estimate_base(spec: BaseSpec, costs: ModelCosts) -> StageNeed:
    """Estimate the stage `base`: one pass over a window with its backward pass."""
    return StageNeed(
        steps=spec.steps,
        batch=spec.batch,
        trained=costs.parameters,
        frozen=0,
        averaged=costs.parameters,
        moments=count_moment_bytes(costs, spec.optimizer),
        copies=count_copy_bytes(costs, 1),
        operations=costs.forward(spec.window).trained(costs.compute.checkpointing),
        memory=0,
        activations=costs.activation_bytes(spec.window),
        latents=count_latent_bytes(costs, spec.window),
        shared=0,
        carried=0,
    )


def estimate_teacher(spec: TeacherSpec, costs: ModelCosts) -> StageNeed:
    """Estimate the stage `teacher`: one pass over a target and its context, of every length that training draws."""
    pasts = spec.view.list_starts(spec.shortest, spec.longest)
    share = (1 - spec.no_context) / len(pasts)
    contexts = Tally({0: spec.no_context})
    for view, part in ((spec.view, 1 - spec.fast_only), (replace(spec.view, sink=0, slow=0), spec.fast_only)):
        for start in pasts:
            contexts.add(len(view.context_frames(start)), share * part)
    passes = {context: plan_scoring(costs, spec.view, spec.target, context) for context in contexts.shares}
    return replace(
        estimate_base(BaseSpec("scratch", None, spec.steps, spec.batch, 1, spec.dropout, spec.optimizer, spec.ema, spec.save_every), costs),
        operations=sum(part * passes[context].trained_operations for context, part in contexts.shares.items()),
        memory=2 * max(scoring.context_bytes for scoring in passes.values()),  # and their gradients
        activations=max(scoring.activation_bytes for scoring in passes.values()),
        latents=count_latent_bytes(costs, spec.longest + spec.target),
        shared=2 * spec.errors.grids * spec.errors.per_grid * count_latent_bytes(costs, spec.target),
        carried=0,
    )


def estimate_causal_init(spec: CausalInitSpec, costs: ModelCosts) -> StageNeed:
    """Estimate the stage `causal_init`: every chunk is denoised and remembered with gradient, and one graph holds all of them.

    `method: ode` makes the same passes; computing its trajectories is left out.
    """
    chunks, ahead = spec.frames // spec.chunk, spec.longest // spec.chunk
    traced = list(islice(trace_memory(spec.memory, spec.chunk), ahead + chunks))
    checkpointing = costs.compute.checkpointing
    only_remembered = [costs.forward(spec.chunk, passes.committing).remembered for passes in traced]
    learned = [
        costs.forward(spec.chunk, passes.denoising).trained(checkpointing)
        + costs.forward(spec.chunk, passes.committing).trained(checkpointing, ends_early=True)
        for passes in traced
    ]
    by_past = [sum(only_remembered[:past]) + sum(learned[past : past + chunks]) for past in range(ahead + 1)]
    # The graph of a pass that only remembers ends at the last block's keys and values.
    last = costs.block_bytes(spec.chunk) + costs.end_bytes(spec.chunk) if not checkpointing else 0
    saved = [
        sum(
            costs.saved_bytes(spec.chunk, passes.denoising) + costs.saved_bytes(spec.chunk, passes.committing) - last
            for passes in traced[past : past + chunks]
        )
        for past in (0, ahead)
    ]
    return replace(
        estimate_base(BaseSpec("scratch", None, spec.steps, spec.batch, 1, spec.dropout, spec.optimizer, spec.ema, spec.save_every), costs),
        operations=spec.begin * by_past[0] + (1 - spec.begin) * sum(by_past) / len(by_past),
        memory=2 * max(len(passes.alive) for passes in traced) * costs.frame_bytes(),  # and their gradients
        activations=max(saved) + costs.live_bytes(spec.chunk, traced[-1].denoising),
        latents=count_latent_bytes(costs, spec.longest + spec.frames),
    )


def count_rolling_bytes(spec: StudentSpec, costs: ModelCosts, seen: int) -> int:
    """Count the bytes that a rollout holds beside the memory, where its passes see at most `seen` remembered frames.

    Passes without gradient keep a second copy of what they see, keys rotated, and the slow part's raw keys (SlotStore). A chunk that is
    noised again has a second store.
    """
    stores = 2 if spec.rollout.renoise == "own" else 1
    store = (2 * spec.memory.size + spec.memory.slow) * costs.frame_bytes() // 2
    return stores * store + costs.passing_bytes(spec.rollout.chunk, seen)


def estimate_student(spec: StudentSpec, costs: ModelCosts, view: TeacherView) -> StageNeed:
    """Estimate stage 1 or 2: a rollout and an update of the critic at every step, at every `critic_updates`-th the student's too.

    The critic's warm-up has none of the student. For the student's update teacher (twice with guidance) and critic look at the window,
    then its chunks are replayed with gradient (docs/performance.md, "Replay"). A context with a pass of its own is read by the critic
    once a step, and by the teacher once a prompt.
    """
    roll = spec.rollout
    view = spec.want_layout(view).view
    windows = Tally({})
    for frames, often in tally_lengths(spec.horizon, roll.chunk, spec.steps).items():
        for start, share in tally_starts(frames, roll).items():
            windows.add(start, often * share)
    longest = max(windows.shares) + roll.window
    traced = list(islice(trace_memory(spec.memory, roll.chunk), longest // roll.chunk))
    rollouts = {start: cost_rollout(spec, costs, traced, start) for start in windows.shares}
    scorings = {start: plan_scoring(costs, view, roll.window, len(view.context_frames(start))) for start in windows.shares}
    operations, prompts = 0.0, 1 if spec.teacher.guidance == 1 else 2
    learns = spec.student_updates / spec.steps  # share of the steps that update the student; in the critic's warm-up none does
    for start, often in windows.shares.items():
        scoring = scorings[start]
        update = (prompts + 1) * scoring.target_operations + prompts * scoring.context_operations + rollouts[start].replay
        # shared: the critic's updates between two of the student use one rollout; own: the student's update has one more
        made = {"each": 1.0, "shared": 1 / spec.critic_updates, "own": 1 + learns}[spec.rollouts]
        rollout = made * rollouts[start].rollout
        if spec.rollouts == "own":
            update += scoring.context_operations  # the critic reads that rollout's context too
        operations += often * (rollout + scoring.trained_operations + learns * update)
    alive = max(costed.alive for costed in rollouts.values())
    outlives = spec.rollouts == "shared" or roll.persist == "stream"
    replayed = max(costs.activation_bytes(roll.chunk, passes.denoising) for passes in traced)
    context = max(scoring.context_bytes for scoring in scorings.values())
    rolling = count_rolling_bytes(spec, costs, max(passes.denoising for passes in traced))
    return StageNeed(
        steps=spec.steps,
        batch=spec.batch,
        trained=2 * costs.parameters,
        frozen=costs.number_bytes * costs.parameters,
        averaged=costs.parameters,
        moments=count_moment_bytes(costs, spec.student_optimizer) + count_moment_bytes(costs, spec.critic_optimizer),
        copies=count_copy_bytes(costs, 2),
        operations=operations,
        memory=alive * costs.frame_bytes() + costs.prompt_bytes() + 2 * context,
        # The critic's graph of the context waits while the teacher looks and the student's chunks are replayed.
        activations=max(
            rolling - 2 * context,  # when there are no contexts yet
            *(
                # the critic's store outlives the student's update, since its context is read once for both
                one.context_bytes
                + max(
                    one.activation_bytes + one.store_bytes,
                    one.saved_bytes + max(replayed, prompts * (one.context_bytes + one.store_bytes)),
                )
                for one in scorings.values()
            ),
        ),
        latents=count_latent_bytes(costs, longest + 3 * roll.window),
        shared=0,
        carried=alive * costs.frame_bytes() + costs.prompt_bytes() + count_latent_bytes(costs, longest) if outlives else 0,
    )
