"""Stage `teacher`: the base model learns to go on from a long past (sec. 3.4)."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from cf_model.data.latents import Latents
from cf_model.model import wan
from cf_model.train.loop import fit
from cf_model.train.teacher import Teacher

from .params import Params
from .tracking import Track, tail


def run(params: Params, track: Track, *, latents: Path, base: Path, out: Path) -> dict[str, float | None]:
    """Error-recycling fine-tuning of the base model into the context teacher, and the layout it was trained with."""
    spec = params.teacher
    model = wan.load(base, params.compute)
    teacher = Teacher(spec, model=model, latents=Latents(latents), flow=params.flow, seed=params.seed)
    fit(teacher.step, steps=spec.steps, state=teacher.state, log=track, save_every=spec.save_every)
    wan.save(teacher.average.model, out)
    # stage2 reads how the teacher was shown its past, so that it can't be shown it otherwise
    layout = {"view": asdict(spec.view), "target": spec.target, "longest": spec.longest}
    (out / "layout.json").write_text(json.dumps(layout, indent=2) + "\n")
    track.save(out)
    return {"loss": tail(out, "loss"), **teacher.bank.statistics()}
