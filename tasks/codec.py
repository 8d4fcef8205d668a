"""Stage `codec`: the linear codec is fitted on kept clips and measured on held-out ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from cf_model.data.video import read_video
from cf_model.model.codec import TIME, fit_codec, save_codec

from .manifest import kept
from .params import Params
from .tracking import Track


def run(params: Params, track: Track, *, clips: Path, manifest: Path, out: Path) -> dict[str, float]:
    """Fits frames 1 + 4k <-> latents 1 + k: components in closed form, then a small decoder network."""
    if params.codec.kind != "linear":
        raise ValueError(f"codec.kind is {params.codec.kind}, whose real-size part is not built yet; use linear")
    size = {"height": params.video.height, "width": params.video.width, "fps": params.video.fps}
    train = [read(clips / row["file"], size) for row in kept(manifest, "train")[: params.codec.clips]]
    bar = track.progress(params.codec.linear.steps, "step")

    def tell(step: int, loss: float) -> None:
        track.log(step, loss=loss)
        bar.update(1, loss=loss)

    codec = fit_codec(train, params.codec.linear, params.seed, tell)
    bar.close()
    save_codec(codec, out)
    track.save(out)
    quality = []
    for row in kept(manifest, "heldout") or kept(manifest, "train")[-4:]:
        clip = read(clips / row["file"], size)
        error = (codec.decode(codec.encode(clip[None]))[0].double() - clip.double()).square().mean()
        quality.append(10 * np.log10(255**2 / max(float(error), 1e-12)))
    return {"psnr": float(np.mean(quality)), "psnr_worst": float(np.min(quality)), "clips": float(len(train))}


def read(path: Path, size: dict[str, int]) -> torch.Tensor:
    """A clip as the codec takes it: uint8, 1 + 4k frames."""
    video = read_video(path, **size)
    return torch.from_numpy(np.ascontiguousarray(video[: 1 + (len(video) - 1) // TIME * TIME]))
