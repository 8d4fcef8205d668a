"""What the stages `stage1` and `stage2` share: one distillation with other parameters (secs. 3.1, 3.2)."""

from __future__ import annotations

from pathlib import Path

import torch

from cf_model.data.latents import Latents
from cf_model.model import wan
from cf_model.model.flow import Flow
from cf_model.model.view import TeacherView
from cf_model.train.loop import fit
from cf_model.train.student import Distillation, StudentSpec

from .tracking import Track, tail


def distil(
    spec: StudentSpec, view: TeacherView, flow: Flow, seed: int, track: Track, *, latents: Path, teacher: Path, student: Path, out: Path
) -> dict[str, float | None]:
    """Trains the student in `student` on the prompts of the training clips; real score and critic start from `teacher`."""
    clips = Latents(latents)
    rows = clips.rows("train")
    distillation = Distillation(
        spec,
        student=wan.load(student),
        teacher=wan.load(teacher),
        critic=wan.load(teacher),
        view=view,
        flow=flow,
        prompts=torch.unique(clips.text(rows), dim=0),
        null=clips.null_text,
        shape=clips.shape,
        seed=seed,
    )
    fit(distillation.step, steps=spec.steps, state=distillation.state, log=track, save_every=spec.save_every)
    wan.save(distillation.average.model, out)
    track.save(out)
    names = ("critic_loss", "score_distance", "normaliser", "student_gradient", "similarity", "frames")
    return {name: value for name in names if (value := tail(out, name)) is not None}
