"""Stage `codec`: the linear codec is fitted on accepted clips, or Wan's is copied; either is measured on held-out clips."""

from pathlib import Path

import numpy as np
import torch

from cf_model.codec.codec_file import save_codec
from cf_model.codec.interface import Codec
from cf_model.codec.linear import fit_codec
from cf_model.data.clip_reader import ClipReader
from cf_model.device import choose_device
from cf_model.evaluate.stutter import measure_reconstruction
from tasks.files.json_lines import Row, read_json_lines
from tasks.params.schema import Params
from tasks.parts.hub import resolve_weights
from tasks.runner.track import Track


def run(params: Params, track: Track, *, clips: Path, manifest: Path, out: Path) -> dict[str, float]:
    """Write models/codec and measure its PSNR and stutter. Linear: fitted in closed form, then a small decoder network. Wan: unchanged."""
    rows = [row for row in read_json_lines(manifest) if row["kept"]]
    train, heldout = ([row for row in rows if row["split"] == split] for split in ("train", "heldout"))
    codec: Codec
    if params.codec.kind == "wan":
        from cf_model.codec.wan_codec import load_wan_codec

        codec, fitted = load_wan_codec(resolve_weights("codec.weights", params.codec.weights, ["vae"])), 0
    else:
        rows = train[: params.codec.clips]
        codec, fitted = fit_linear_codec(params, track, clips, rows), len(rows)
    save_codec(codec, out)
    track.save(out)
    codec = codec.to(choose_device())
    measured = heldout or train[-4:]
    bar = track.progress(len(measured), "clip")
    quality, stutter = [], []
    with ClipReader(clips, params.video.model_dump()) as reader:
        for row in measured:
            psnr, moving = measure_reconstruction(codec, reader.read(row))
            quality.append(psnr)
            stutter += [] if moving is None else [moving]
            bar.update()
    values = {"psnr": float(np.mean(quality)), "psnr_worst": float(np.min(quality)), "clips": float(fitted)}
    return values | ({"stutter": float(np.mean(stutter))} if stutter else {})


def fit_linear_codec(params: Params, track: Track, clips: Path, rows: list[Row]) -> Codec:
    """Fit the linear codec on these clips, logging the loss of each step."""
    with ClipReader(clips, params.video.model_dump()) as reader:
        train = [torch.cat(list(reader.read(row)), dim=1)[0] for row in rows]
    bar = track.progress(params.codec.linear.steps, "step")

    def tell(step: int, loss: float) -> None:
        track.log(step, loss=loss)
        bar.update(1, loss=loss)

    return fit_codec(train, params.codec.linear, params.seed, tell)
