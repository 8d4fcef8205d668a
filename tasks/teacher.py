"""Stage `teacher`: the base model learns to go on from a long past (sec. 3.4)."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from safetensors.torch import save_file

from cf_model.data.latents import Latents
from cf_model.foreign import lora
from cf_model.model import wan
from cf_model.model.denoiser import Denoiser
from cf_model.train.adapter import LoraSpec
from cf_model.train.layout import TeacherLayout
from cf_model.train.teacher import TeacherTrainer
from cf_model.train.trainer.loop import fit
from cf_model.train.trainer.samples import sample_continuation
from tasks.params.schema import Params
from tasks.parts.device import choose_device
from tasks.parts.sample_videos import SampleWriter
from tasks.runner.track import Track, mean_of_tail


def run(params: Params, track: Track, *, latents: Path, codec: Path, base: Path, out: Path) -> dict[str, float | None]:
    """Error-recycling fine-tuning of the base model into the context teacher; its mistakes and its layout go with it."""
    spec, clips = params.teacher, Latents(latents)
    model = wan.load_transformer(base, params.compute).to(choose_device())
    teacher = TeacherTrainer(spec, model=model, latents=clips, flow=params.flow, seed=params.seed, engine=params.engine)
    plan = params.samples.teacher
    make = partial(sample_continuation, teacher.average.model, spec=plan, view=spec.view, flow=params.flow, null=clips.null_text)
    fit(
        teacher.step,
        steps=spec.steps,
        state=teacher.state,
        log=track,
        save_every=spec.save_every,
        seen=teacher.seen,
        clock=teacher.clock,
        sample=SampleWriter(plan, track, clips, codec, make),
    )
    if spec.lora.rank:
        save_adapter(teacher.average.model, spec.lora, base, out)
    else:
        wan.save_transformer(teacher.average.model, out)
    teacher.bank.save(out)
    TeacherLayout(spec.view, spec.target, spec.longest).save(out)
    track.save(out)
    return {"loss": mean_of_tail(out, "loss"), **teacher.bank.statistics()}


def save_adapter(model: Denoiser, spec: LoraSpec, base: Path, out: Path) -> None:
    """The merged model, as any other stage's, and adapter/ as peft writes one: `cf import-weights` adds it to its base."""
    pairs, rest = lora.split(model.transformer.state_dict())
    merged, _ = lora.merge(rest, pairs, lora.Scale(spec.alpha, None, False), None)
    whole = wan.load_transformer(base)
    whole.transformer.load_state_dict(merged)
    wan.save_transformer(whole, out)
    folder = out / "adapter"
    folder.mkdir()
    named = {f"base_model.model.{name.replace('.default.', '.')}": tensor.contiguous() for name, tensor in pairs.items()}
    save_file(named, folder / "adapter_model.safetensors")
    # by hand: peft's own file lists the targets in another order each time, and a rerun must give the same bytes
    facts = {"peft_type": "LORA", "r": spec.rank, "lora_alpha": spec.alpha, "target_modules": list(spec.targets or ())}
    facts |= {"lora_dropout": 0.0, "bias": "none", "base_model_name_or_path": None, "task_type": None, "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(facts, indent=1) + "\n")
