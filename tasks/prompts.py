"""Stage `prompts`: the prompts that students are trained on, embedded once: the training clips' captions, or those of a file."""

from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from cf_model.data.embedded_prompts import write_prompts
from cf_model.data.latents import Latents
from cf_model.data.prompts import iterate_prompts, read_prompts, select_distinct
from tasks.params.nightly import CAPTIONS
from tasks.params.schema import Params
from tasks.parts.caption_encoder import CaptionEncoder
from tasks.runner.track import Track


def run(params: Params, track: Track, *, source: Path, latents: Path, out: Path) -> dict[str, float]:
    """Write data/prompts. `source` is the manifest, for the training clips' captions, or a file of prompts (start.prompts).

    Each prompt stands there once. A file's prompts that are also shown in the evaluation are left out.
    """
    clips = Latents(latents)
    train, heldout = clips.rows("train"), clips.captions(clips.rows("heldout"))
    layout = {"shard": params.encode.shard, "dtype": getattr(torch, params.encode.dtype)}
    if source == CAPTIONS:
        # The clips' captions are embedded already. Clips are held out, not captions: one may also be a held-out clip's.
        rows = {caption: row for caption, row in zip(clips.captions(train), train, strict=True)}
        chosen = islice(rows, params.prompts.most)
        return {"prompts": write_prompts(out, chosen, lambda texts: clips.text([rows[text] for text in texts]), **layout)}
    shown = [*heldout, *(read_prompts(params.generate.prompts_file) if params.generate.prompts_file else [])]
    total = sum(1 for _ in iterate_prompts(source))  # to its end, because a bad line must be refused before hours of embedding
    distinct = select_distinct((prompt for _, prompt in iterate_prompts(source)), without=shown)
    encoder, progress = CaptionEncoder(params.text, "prompts"), track.progress(params.prompts.most or total, unit="prompt")

    def embed(texts: list[str]) -> Tensor:
        embedded = encoder.encode(texts)
        progress.update(len(texts))
        return embedded

    count = write_prompts(out, islice(distinct, params.prompts.most), embed, **layout)
    progress.close()
    encoder.cache.sweep()
    track.facts |= {"prompts_encoded": encoder.cache.new_entries}
    return {"prompts": count, "left_out": total - count}
