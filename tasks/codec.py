"""Stage `codec`: the linear codec is fitted on kept clips, or Wan's is brought here; measured on held-out ones."""

from __future__ import annotations

from itertools import tee
from pathlib import Path

import numpy as np
import torch

from cf_model.codec.codec_file import save_codec
from cf_model.codec.linear import Codec, fit_codec
from tasks.params.schema import Params
from tasks.parts.codec_frames import frames
from tasks.parts.device import device
from tasks.parts.hub import local
from tasks.parts.manifest import kept
from tasks.runner.track import Track


def run(params: Params, track: Track, *, clips: Path, manifest: Path, out: Path) -> dict[str, float]:
    """Writes models/codec. Linear: components in closed form, then a small decoder network. Wan's: AutoencoderKLWan as it is."""
    train = kept(manifest, "train")
    codec: Codec
    if params.codec.kind == "wan":
        from cf_model.codec.wan_codec import load_wan

        codec, fitted = load_wan(local("codec.weights", params.codec.weights, ["vae"])), 0
    else:
        files = [clips / row["file"] for row in train[: params.codec.clips]]
        codec, fitted = fit(params, track, files), len(files)
    save_codec(codec, out)
    track.save(out)
    codec = codec.to(device())
    measured = kept(manifest, "heldout") or train[-4:]
    bar = track.progress(len(measured), "clip")
    quality = []
    for row in measured:
        quality.append(psnr(params, codec, clips / row["file"]))
        bar.update(1)
    bar.close()
    return {"psnr": float(np.mean(quality)), "psnr_worst": float(np.min(quality)), "clips": float(fitted)}


def fit(params: Params, track: Track, files: list[Path]) -> Codec:
    train = [torch.cat(list(frames(file, params.video)), dim=1)[0] for file in files]
    bar = track.progress(params.codec.linear.steps, "step")

    def tell(step: int, loss: float) -> None:
        track.log(step, loss=loss)
        bar.update(1, loss=loss)

    codec = fit_codec(train, params.codec.linear, params.seed, tell)
    bar.close()
    return codec


def psnr(params: Params, codec: Codec, file: Path) -> float:
    """Of a clip that went there and back, in dB; piece by piece, however long it is."""
    pieces, truth = tee(frames(file, params.video))
    again = (frame for part in codec.decode_stream(codec.encode_stream(pieces)) for frame in part[0])
    pairs = zip(again, (frame for part in truth for frame in part[0]), strict=True)
    error = np.mean([float((one.double() - other.double()).square().mean()) for one, other in pairs])
    return float(10 * np.log10(255**2 / max(float(error), 1e-12)))
