"""Stage `causal_init`: the base model becomes causal and few-step, by teacher forcing."""

from __future__ import annotations

from pathlib import Path

from cf_model.data.latents import Latents
from cf_model.model import wan
from cf_model.train.causal_init import CausalInit
from cf_model.train.loop import fit

from .params import Params
from .tracking import Track, tail


def run(params: Params, track: Track, *, latents: Path, base: Path, out: Path) -> dict[str, float | None]:
    """Teaches the base model to denoise a chunk after the clean chunks before it, through the student's memory."""
    spec = params.causal_init
    if spec.method != "teacher_forcing":
        raise ValueError(f"causal_init.method is {spec.method}, which is not built yet; use teacher_forcing")
    model = wan.load(base, params.compute)
    init = CausalInit(spec, model=model, latents=Latents(latents), flow=params.flow, seed=params.seed)
    fit(init.step, steps=spec.steps, state=init.state, log=track, save_every=spec.save_every)
    wan.save(init.average.model, out)
    track.save(out)
    return {"loss": tail(out, "loss")}
