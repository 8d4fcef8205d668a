"""Stage `stage1`: local distribution matching on one window (sec. 3.1, eqs. 3 and 4)."""

from dataclasses import replace
from pathlib import Path

from cf_model.distillation import MEASURED, DistillationJob, train_student
from tasks.params.schema import Params
from tasks.runner.track import Track, list_means_of_tail


def run(
    params: Params, track: Track, *, latents: Path, prompts: Path, codec: Path, base: Path, causal_init: Path, out: Path
) -> dict[str, float]:
    """Teach the causal student to generate windows like the base model's in few steps, on its own rollouts."""
    # Choice: the base model is the real score here, not the context teacher without a context: it is the better
    # model of one window, and stage 1 then doesn't wait for the teacher.
    view = replace(params.teacher.view, context=params.stage1.teacher.context)
    job = DistillationJob(params.stage1, view, params.flow, params.compute, params.samples.stage1, params.engine, params.seed)
    train_student(job, track, latents=latents, prompts=prompts, codec=codec, teacher=base, student=causal_init, out=out)
    track.save(out)
    return list_means_of_tail(out, MEASURED)
