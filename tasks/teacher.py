"""Stage `teacher`: the base model learns to continue a long past, by error-recycling fine-tuning (sec. 3.4)."""

from functools import partial
from pathlib import Path

from cf_model.data.latents import Latents
from cf_model.device import choose_device
from cf_model.model import wan
from cf_model.sample_videos import SampleWriter
from cf_model.train.adapter import merge_lora, save_adapter
from cf_model.train.layout import TeacherLayout
from cf_model.train.teacher import TeacherTrainer
from cf_model.train.trainer.loop import fit
from cf_model.train.trainer.samples import sample_continuation
from tasks.params.schema import Params
from tasks.runner.track import Track, mean_of_tail


def run(params: Params, track: Track, *, latents: Path, codec: Path, base: Path, out: Path) -> dict[str, float | None]:
    """Fine-tune the base model into the context teacher; its error bank and its layout are written beside its weights."""
    spec, clips = params.teacher, Latents(latents)
    model = wan.load_transformer(base, params.compute).to(choose_device())
    teacher = TeacherTrainer(spec, model=model, latents=clips, flow=params.flow, seed=params.seed, engine=params.engine)
    plan = params.samples.teacher
    make = partial(sample_continuation, teacher.ema.model, spec=plan, view=spec.view, flow=params.flow, null=clips.null_text)
    fit(teacher, track, SampleWriter(plan, track, clips, codec, make))
    if spec.lora.rank:  # the merged model is written as any stage writes its own, and beside it the adapters that were trained
        assert spec.lora.alpha
        merged, adapter = merge_lora(teacher.ema.model.transformer.state_dict(), spec.lora.alpha)
        plain = wan.load_transformer(base)
        plain.transformer.load_state_dict(merged)
        wan.save_transformer(plain, out)
        save_adapter(adapter, spec.lora, out / "adapter")
    else:
        wan.save_transformer(teacher.ema.model, out)
    teacher.bank.save(out)
    TeacherLayout(spec.view, spec.target, teacher.starts.longest).save(out)
    track.save(out)
    return {"loss": mean_of_tail(out, "loss"), **teacher.bank.statistics()}
