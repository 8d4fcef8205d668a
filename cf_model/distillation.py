"""The distillation that the stages `stage1` and `stage2` run with different settings (secs. 3.1, 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from torch import Tensor

from cf_model.codec.codec_file import load_codec
from cf_model.data.embedded_prompts import EmbeddedPrompts
from cf_model.data.latents import Latents
from cf_model.model import wan
from cf_model.model.denoiser import Compute
from cf_model.model.flow import Flow
from cf_model.model.view import TeacherView
from cf_model.train.student import DistillationTrainer, StudentSpec
from cf_model.train.trainer.engine import EngineSpec
from cf_model.train.trainer.loop import TrainingLog, fit
from cf_model.train.trainer.samples import SampleSpec, sample_stream

from .device import choose_device
from .sample_videos import SampleLog, SampleWriter

MEASURED = ("critic_loss", "score_distance", "normaliser", "student_gradient", "similarity", "frames")  # values of steps


class DistillationLog(TrainingLog, SampleLog, Protocol):
    """Where a distillation reports its steps and shows its samples."""


@dataclass(frozen=True)
class DistillationJob:
    """Settings of one distillation from params.yaml, and the view of the past that both scores have."""

    spec: StudentSpec
    view: TeacherView
    flow: Flow
    compute: Compute
    samples: SampleSpec
    engine: EngineSpec
    seed: int


def train_student(
    job: DistillationJob, log: DistillationLog, *, latents: Path, prompts: Path, codec: Path, teacher: Path, student: Path, out: Path
) -> None:
    """Train the student in the folder `student` on the prompts in `prompts`, and write its average to `out`.

    Real score and critic both begin with the weights in `teacher` (alg. 1).
    """
    clips, spec = Latents(latents), job.spec
    distillation = DistillationTrainer(
        spec,
        student=wan.load_transformer(student, job.compute).to(choose_device()),
        teacher=wan.load_transformer(teacher, job.compute).to(choose_device()),
        critic=wan.load_transformer(teacher, job.compute).to(choose_device()),
        view=job.view,
        flow=job.flow,
        prompts=EmbeddedPrompts(prompts),
        clips=clips,
        null=clips.null_text,
        shape=clips.shape,
        seed=job.seed,
        engine=job.engine,
        reencode=build_reencoder(codec) if spec.teacher.first_latent == "reencode" else None,
    )
    levels, chunk = spec.rollout.levels, spec.rollout.chunk
    make = partial(sample_stream, distillation.ema.model, spec=job.samples, levels=levels, chunk=chunk, memory=spec.memory, flow=job.flow)
    fit(distillation, log, SampleWriter(job.samples, log, clips, codec, make))
    wan.save_transformer(distillation.ema.model, out)


def build_reencoder(folder: Path) -> Callable[[Tensor], Tensor]:
    """Build a function that encodes the last video frame of some latents [B, F, C, H, W] as a picture's latent, [B, 1, C, H, W]."""
    codec = load_codec(folder).to(choose_device())

    def reencode(latents: Tensor) -> Tensor:
        # Every frame before the last must be decoded too, so a few at a time.
        *_, last = codec.decode_stream(latents.split(3, dim=1))
        return codec.encode(last[:, -1:]).to(latents)

    return reencode
