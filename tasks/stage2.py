"""Stage `stage2`: contextual distribution matching on long rollouts (sec. 3.2, alg. 1)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from cf_model.model.view import TeacherView

from .params import Params
from .student import Job, distil
from .tracking import Track


def run(
    params: Params, track: Track, *, latents: Path, codec: Path, teacher: Path, stage1: Path, out: Path
) -> dict[str, float | None]:
    """The student learns to go on from its own past, scored by a teacher that sees the same past."""
    spec = params.stage2
    trained = TeacherView(**json.loads((teacher / "layout.json").read_text())["view"])
    if spec.teacher.context not in ("none", trained.context) and spec.teacher.mismatch == "refuse":
        stated = spec.teacher.context
        raise ValueError(f"stage2.teacher.context is {stated}, but the teacher was trained on {trained.context}; use that, or none")
    view = replace(trained, context=spec.teacher.context)
    job = Job(spec, view, params.flow, params.compute, params.seed + 1)
    return distil(job, track, latents=latents, codec=codec, teacher=teacher, student=stage1, out=out)
