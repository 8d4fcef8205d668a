"""Stage `base`: a text-to-video model of one window, by flow matching."""

from __future__ import annotations

from pathlib import Path

from cf_model.data.latents import Latents
from cf_model.model import wan
from cf_model.train.base import Base
from cf_model.train.loop import fit

from .params import Params
from .tracking import Track, tail


def run(params: Params, track: Track, *, latents: Path, out: Path) -> dict[str, float | None]:
    """Trains a small diffusers WanTransformer3DModel on windows of the clips."""
    spec = params.base
    if spec.init != "scratch":
        raise ValueError(f"base.init is {spec.init}, whose real-size part is not built yet; use scratch")
    clips = Latents(latents)
    sizes = {"channels": clips.shape[0], "text_channels": params.text.channels}
    model = wan.build(params.model, **sizes, seed=params.seed, attention=params.compute.attention)
    model.checkpointing(params.compute.checkpointing)
    base = Base(spec, model=model, latents=clips, flow=params.flow, seed=params.seed)
    fit(base.step, steps=spec.steps, state=base.state, log=track, save_every=spec.save_every)
    wan.save(base.average.model, out)
    track.save(out)
    return {"loss": tail(out, "loss"), "parameters": float(sum(p.numel() for p in model.parameters()))}
