"""Stage `base`: a text-to-video model of one window, trained by flow matching, or imported: Wan."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

from cf_model.data.latents import Latents
from cf_model.device import choose_device
from cf_model.foreign import import_checkpoint
from cf_model.model import wan
from cf_model.sample_videos import SampleWriter
from cf_model.train.base import BaseTrainer
from cf_model.train.trainer.loop import fit
from cf_model.train.trainer.samples import sample_from_noise
from tasks.params.schema import Params
from tasks.parts.hub import resolve_weights
from tasks.runner.track import Track, mean_of_tail


def run(params: Params, track: Track, *, latents: Path, codec: Path, out: Path) -> dict[str, float | None]:
    """Train a small diffusers WanTransformer3DModel on windows of the clips, or import a large one that is trained already."""
    spec, clips = params.base, Latents(latents)
    if spec.init == "wan":
        return _import_base(params, clips, out, track)
    sizes = {"channels": clips.shape[0], "text_channels": params.text.channels}
    model = wan.build_transformer(params.model, **sizes, seed=params.seed, compute=params.compute).to(choose_device())
    base = BaseTrainer(spec, model=model, latents=clips, flow=params.flow, seed=params.seed, engine=params.engine)
    plan = params.samples.base
    make = partial(sample_from_noise, base.ema.model, spec=plan, flow=params.flow, null=clips.null_text)
    fit(base, track, SampleWriter(plan, track, clips, codec, make))
    wan.save_transformer(base.ema.model, out)
    track.save(out)
    return {"loss": mean_of_tail(out, "loss"), "parameters": float(sum(p.numel() for p in base.ema.model.parameters()))}


def _import_base(params: Params, clips: Latents, out: Path, track: Track) -> dict[str, float | None]:
    """Import a checkpoint in any layout that `cf import-weights` reads.

    Raises ValueError unless it has the sizes that params.yaml states and the latents have.
    """
    facts = import_checkpoint.import_transformer(resolve_weights("base.weights", params.base.weights, ["transformer"]), out)
    wanted = asdict(params.model) | {"channels": clips.shape[0], "text_channels": params.text.channels}
    imported = facts["model"] | {name: facts[name] for name in ("channels", "text_channels")}
    for name, value in imported.items():
        if value != wanted[name]:
            where = {"channels": "the latents have", "text_channels": "text.channels is"}.get(name, f"model.{name} is")
            raise ValueError(f"base.weights is {params.base.weights} with {name} {value}, but {where} {wanted[name]}; use weights that fit")
    track.save(out)
    return {"parameters": float(facts["parameters"])}
