"""Stage `causal_init`: the base model becomes causal and few-step, by teacher forcing or by ODE regression."""

from functools import partial
from pathlib import Path

import torch

from cf_model.data.embedded_prompts import EmbeddedPrompts
from cf_model.data.latents import Latents
from cf_model.device import choose_device
from cf_model.model import wan
from cf_model.model.denoiser import Denoiser
from cf_model.sample_videos import SampleWriter
from cf_model.train.causal_init import CausalInitTrainer
from cf_model.train.trainer.loop import fit
from cf_model.train.trainer.samples import sample_stream
from cf_model.train.trajectories import OdeTrajectories
from tasks.params.schema import Params
from tasks.runner.track import Track, mean_of_tail


def run(params: Params, track: Track, *, latents: Path, prompts: Path, codec: Path, base: Path, out: Path) -> dict[str, float | None]:
    """Teach the base model to denoise a chunk after the chunks before it, which it sees through the student's memory."""
    spec, clips = params.causal_init, Latents(latents)
    model = wan.load_transformer(base, params.compute).to(choose_device())
    odes = _compute_trajectories(params, model, clips, EmbeddedPrompts(prompts), track) if spec.method == "ode" else None
    init = CausalInitTrainer(spec, model=model, latents=clips, flow=params.flow, seed=params.seed, engine=params.engine, trajectories=odes)
    plan, student = params.samples.causal_init, init.ema.model
    make = partial(sample_stream, student, spec=plan, levels=plan.levels, chunk=spec.chunk, memory=spec.memory, flow=params.flow)
    fit(init, track, SampleWriter(plan, track, clips, codec, make))
    wan.save_transformer(init.ema.model, out)
    track.save(out)
    return {"loss": mean_of_tail(out, "loss")}


def _compute_trajectories(params: Params, model: Denoiser, clips: Latents, prompts: EmbeddedPrompts, track: Track) -> OdeTrajectories:
    """Compute the base model's trajectories in the stage's working folder, where a restarted run finds those of a killed one."""
    spec, shape = params.causal_init.ode, (params.causal_init.frames, *clips.shape)
    dtype = getattr(torch, params.compute.dtype)  # more precision than the model's products have would be wasted
    folder = track.work / "trajectories"
    trajectories = OdeTrajectories(folder, spec, prompts=prompts, shape=shape, flow=params.flow, dtype=dtype, seed=params.seed + 1)
    trajectories.compute(model, clips.null_text, track)
    return trajectories
