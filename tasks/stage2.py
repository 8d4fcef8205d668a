"""Stage `stage2`: contextual distribution matching on long rollouts (sec. 3.2, eqs. 5 and 6, alg. 1)."""

from pathlib import Path

from cf_model.distillation import MEASURED, DistillationJob, train_student
from cf_model.train.layout import read_agreed_view
from tasks.params.schema import Params
from tasks.runner.track import Track, list_means_of_tail


def run(
    params: Params, track: Track, *, latents: Path, prompts: Path, codec: Path, teacher: Path, student: Path, out: Path
) -> dict[str, float]:
    """Teach the student to continue its own past, scored by a teacher that sees the same past.

    The student begins with the weights in `student`: stage 1's, or those that start.stage2 names.
    """
    spec = params.stage2
    view = read_agreed_view(teacher, spec.want_layout(params.teacher.view), accept=spec.teacher.mismatch == "accept")
    job = DistillationJob(spec, view, params.flow, params.compute, params.samples.stage2, params.engine, params.seed + 1)
    train_student(job, track, latents=latents, prompts=prompts, codec=codec, teacher=teacher, student=student, out=out)
    track.save(out)
    return list_means_of_tail(out, MEASURED)
