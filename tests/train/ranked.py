"""One of several ranks, as a process: trains small jobs and leaves their weights. `python -m tests.train.ranked PLAN FOLDER`"""

from __future__ import annotations

import json
import math
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from cf_model.codec.codec_file import save_codec
from cf_model.codec.linear import LinearCodec
from cf_model.model.denoiser import Denoiser
from cf_model.model.rollout import HorizonSpec
from cf_model.model.view import TeacherView
from cf_model.sample_videos import MakeSample, SampleWriter
from cf_model.train.adapter import LoraSpec
from cf_model.train.base import BaseSpec, BaseTrainer
from cf_model.train.causal_init import CausalInitSpec, CausalInitTrainer
from cf_model.train.erft import ErrorBank, ErrorSpec
from cf_model.train.student import DistillationTrainer, ScoreSpec, StudentSpec
from cf_model.train.teacher import TeacherSpec, TeacherTrainer
from cf_model.train.trainer.engine import EngineSpec, OptimizerSpec
from cf_model.train.trainer.loop import fit
from cf_model.train.trainer.ranks import get_rank, is_first_rank
from cf_model.train.trainer.samples import ContinuedSpec, SampleSpec, WindowSpec, sample_continuation, sample_from_noise, sample_stream
from cf_model.train.trajectories import OdeSpec
from tasks.runner import ranks
from tasks.runner.track import Track
from tests.small import FLOW, SHAPE, denoiser, normal, rolling, spec

BATCH, STEPS = 4, 8


class Clips:
    """Eight clips of random latents, each with its own prompt."""

    shape = SHAPE
    empty_text = torch.zeros(5, 8)
    fps = 16.0

    def rows(self, split: str, at_least: int = 1) -> list[int]:
        return list(range(8))

    def frames(self, row: int) -> int:
        return 24 + row

    def window(self, rows: list[int], starts: list[int], length: int) -> Tensor:
        return torch.stack([normal(40, *SHAPE, seed=row)[start : start + length] for row, start in zip(rows, starts, strict=True)])

    def text(self, rows: list[int]) -> Tensor:
        return torch.stack([normal(5, 8, seed=100 + row) for row in rows])

    def captions(self, rows: list[int]) -> list[str]:
        return [f"clip {row}" for row in rows]


# the weights' steps must show, but Adam's first ones are signs of gradients, and those of rounding alone differ
OPTIMIZER = OptimizerSpec(lr=1e-4, muon_lr=0.0, beta1=0.9, beta2=0.98, weight_decay=0.01, muon_decay=0.0, clip=1.0, warmup=3, decay=0.5)
COMMON = {"ema": 0.9, "save_every": 4}


def engine_spec(stated: dict[str, Any]) -> EngineSpec:
    return EngineSpec(**{"use": "torch", "zero": 0, "offload": "none", "micro_batch": None} | stated)


ENGINE = engine_spec({})


def base() -> tuple[BaseTrainer, dict[str, Denoiser]]:
    plan = BaseSpec(init="scratch", weights=None, steps=STEPS, batch=BATCH, window=4, dropout=0.2, optimizer=OPTIMIZER, **COMMON)  # type: ignore[arg-type]
    job = BaseTrainer(plan, model=denoiser(), latents=Clips(), flow=FLOW, seed=3, engine=ENGINE)
    return job, {"model": job.model}


def teacher() -> tuple[TeacherTrainer, dict[str, Denoiser]]:
    """Mistakes everywhere, of levels that fill up and replace; every kind of context, read by a pass of its own."""
    errors = ErrorSpec(context=0.7, latent=0.7, noise=0.5, clean=0.3, clean_update=0.5, segments="fast", grids=3, per_grid=3,
                       dtype="float32", bytes=1_000_000, warmup=3)  # fmt: skip
    plan = {"steps": STEPS, "batch": BATCH, "target": 6, "shortest": 6, "longest": 17, "no_context": 0.2, "fast_only": 0.2, "dropout": 0.2}
    plan |= {
        "view": TeacherView("memory", 3, 3, 6, 3, 3, "zero", "own"),
        "errors": errors,
        "weight": "bell",
        "lora": LoraSpec(None, None, None),
    }
    plan |= {"optimizer": OPTIMIZER, **COMMON}
    job = TeacherTrainer(TeacherSpec(**plan), model=denoiser(), latents=Clips(), flow=FLOW, seed=3, engine=ENGINE)  # type: ignore[arg-type]
    return job, {"model": job.model}


def causal_init() -> tuple[CausalInitTrainer, dict[str, Denoiser]]:
    plan = {"method": "teacher_forcing", "steps": STEPS, "batch": BATCH, "frames": 6, "longest": 9, "begin": 0.3, "chunk": 3}
    plan |= {"ode": OdeSpec(videos=2, batch=2, steps=4, keep=(0, 2), shift=3.0, guidance=1.0, context="noisy")}
    plan |= {"dropout": 0.2, "memory": spec(tau=0.9), "optimizer": OPTIMIZER, **COMMON}
    job = CausalInitTrainer(CausalInitSpec(**plan), model=denoiser(), latents=Clips(), flow=FLOW, seed=3, engine=ENGINE)  # type: ignore[arg-type]
    return job, {"model": job.model}


def student(more: dict[str, Any] | None = None) -> tuple[DistillationTrainer, dict[str, Denoiser]]:
    plan = {"steps": STEPS, "critic_updates": 2, "critic_warmup": 0, "rollouts": "each", "batch": BATCH}
    plan |= {"memory": spec(slow=3, fast=3, tau=0.9)}
    plan |= {"rollout": rolling(levels=(1.0, 0.5), window=6), "horizon": HorizonSpec(shortest=9, longest=18, decay=0, mode="linear")}
    scores = ScoreSpec(context="memory", guidance=2.0, guidance_passes="apart", mismatch="refuse", first_latent="as_is")
    plan |= {"teacher": scores, "critic_weight": "bell"}
    plan |= {"student_optimizer": OPTIMIZER, "critic_optimizer": OPTIMIZER, "ema_start": 0, "ema_ramp": True, **COMMON, **(more or {})}
    whole = StudentSpec(**plan)  # type: ignore[arg-type]
    job = DistillationTrainer(
        whole,
        student=denoiser(0),
        teacher=denoiser(1),
        critic=denoiser(1),
        view=whole.want_layout(TeacherView("sparse", 3, 3, 3, 6, 3, "zero", "joint")).view,
        flow=FLOW,
        prompts=normal(7, 5, 8),
        null=torch.zeros(5, 8),
        shape=SHAPE,
        seed=0,
        clips=Clips(),
        engine=ENGINE,
    )
    return job, {"student": job.student, "critic": job.critic}


def streaming() -> tuple[DistillationTrainer, dict[str, Denoiser]]:
    """The same, on videos that go on from step to step, each for six chunks."""
    scores = ScoreSpec(context="sparse", guidance=2.0, guidance_passes="apart", mismatch="refuse", first_latent="as_is")
    return student({"rollout": rolling(levels=(1.0, 0.5), window=6, full_first=1, skip_first=1, persist="stream"), "teacher": scores})


def sharing() -> tuple[DistillationTrainer, dict[str, Denoiser]]:
    """The same, with one rollout for three updates of the critic, which learns alone at first; some rollouts continue a clip."""
    rolled = rolling(levels=(1.0, 0.5), window=6, begin="share")
    return student({"rollouts": "shared", "critic_updates": 3, "critic_warmup": 3, "rollout": rolled})


def broken() -> tuple[BaseTrainer, dict[str, Denoiser]]:
    """The base model, whose clips are not numbers in the third step."""

    class Torn(Clips):
        asked = 0

        def window(self, rows: list[int], starts: list[int], length: int) -> Tensor:
            self.asked += 1
            return super().window(rows, starts, length) * (math.nan if (self.asked - 1) // job.random.count == 2 else 1.0)

    job, models = base()
    job.latents = Torn()
    return job, models


def sampler(
    job: BaseTrainer | CausalInitTrainer | DistillationTrainer | TeacherTrainer, track: Track, codec: Path, every: int
) -> SampleWriter:
    """Two videos of each set: a window, of the teacher after a real beginning, or a stream."""
    given = {"every": every, "prompts": 2, "seed": 1, "crf": 16}
    plan: SampleSpec
    make: MakeSample
    if isinstance(job, BaseTrainer):
        plan = WindowSpec(frames=4, sampler_steps=3, guidance=1.5, **given)
        make = partial(sample_from_noise, job.ema.model, spec=plan, flow=FLOW, null=torch.zeros(5, 8))
    elif isinstance(job, TeacherTrainer):
        plan = ContinuedSpec(frames=12, prefix=6, sampler_steps=3, guidance=1.5, **given)
        make = partial(sample_continuation, job.ema.model, spec=plan, view=job.spec.view, flow=FLOW, null=torch.zeros(5, 8))
    else:
        plan = SampleSpec(frames=12, **given)
        make = partial(sample_stream, job.ema.model, spec=plan, levels=(1.0, 0.5), chunk=3, memory=job.spec.memory, flow=FLOW)
    return SampleWriter(plan, track, Clips(), codec, make)  # type: ignore[arg-type]


def small_codec(folder: Path) -> Path:
    torch.manual_seed(0)
    codec = LinearCodec(SHAPE[0], 8)
    codec.decoder.copy_(normal(*codec.decoder.shape, seed=9) / 20)
    save_codec(codec, folder)
    return folder


class SentNumbers:
    """Counts what ranks send each other, by torch.distributed's function: calls, and numbers in all of them."""

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = {}
        for name in ("all_reduce", "reduce", "all_gather", "reduce_scatter_tensor", "all_gather_into_tensor"):
            setattr(dist, name, partial(self._count, name, getattr(dist, name)))

    def _count(self, name: str, send: Any, *given: Any, **named: Any) -> Any:
        tensor = given[0] if given else named.get("tensor", named.get("input_tensor"))
        counts = self.counts.setdefault(name, [0, 0])
        counts[0] += 1
        counts[1] += sum(one.numel() for one in tensor) if isinstance(tensor, list) else tensor.numel()
        return send(*given, **named)


SENT = SentNumbers()


def train(name: str, out: Path, steps: int, every: int) -> None:
    job, models = globals()[name]()
    track = Track(name, out) if is_first_rank() else ranks.Follower(name, out)
    track.finished = lambda: None  # type: ignore[method-assign]
    codec = small_codec(out / "codec") if is_first_rank() else out / "no codec"  # a rank that follows has no use for it
    samples = sampler(job, track, codec, every)
    job.steps = steps
    SENT.counts.clear()
    fit(job, track, samples)
    if is_first_rank():
        (out / "sent.json").write_text(json.dumps(SENT.counts))
    parts = {model: job.state[model].state_dict() for model in models}
    if is_first_rank():
        save_file({f"{model}/{key}": value for model, part in parts.items() for key, value in part.items()}, out / "weights.safetensors")
    if isinstance(bank := job.state.get("bank"), ErrorBank):
        save_file(bank.state_dict(), out / f"bank-{get_rank()}.safetensors")


def follow(plan: list[dict[str, Any]], folder: Path) -> None:
    """One job after the other, each with its own engine; `begin` is a folder whose checkpoints a job goes on from. Videos are made every
    `every` steps, or never."""
    global ENGINE
    for entry in plan:
        ENGINE = engine_spec(entry.get("engine", {}))
        out = folder / entry["out"]
        if is_first_rank():
            shutil.copytree(folder / entry["begin"], out) if "begin" in entry else out.mkdir(parents=True, exist_ok=True)
        if dist.is_initialized():
            dist.barrier()
        train(entry["out"].split("/")[-1], out, entry.get("steps", STEPS), entry.get("every", 0))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if ranks.get_rank() is not None:
        ranks.join_ranks()
    follow(json.loads(sys.argv[1]), Path(sys.argv[2]))
