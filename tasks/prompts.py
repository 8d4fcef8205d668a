"""Stage `prompts`: the prompts that students are trained on, embedded once: the training clips' captions, or those of a file."""

from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from cf_model.data.embedded_prompts import write_prompts
from cf_model.data.latents import Latents
from cf_model.data.prompts import PromptSplit, read_prompts, select_distinct
from tasks.files.atomic import swap_into_place
from tasks.params.nightly import CAPTIONS, HELDOUT
from tasks.params.schema import Params
from tasks.parts.caption_encoder import CaptionEncoder
from tasks.runner.track import Track


def run(params: Params, track: Track, *, source: Path, latents: Path, out: Path) -> dict[str, float]:
    """Write data/prompts. `source` is the manifest, for the training clips' captions, or a file of prompts (start.prompts).

    Each prompt stands there once. A file's prompts that are shown in the evaluation are left out; heldout.txt has the share held out.
    """
    clips, most = Latents(latents), params.prompts.most
    train, shown = clips.rows("train"), clips.captions(clips.rows("heldout"))
    work, layout = track.work / "prompts", {"shard_mib": params.encode.shard_mib, "dtype": getattr(torch, params.encode.dtype)}
    if source == CAPTIONS:
        # The clips' captions are embedded already. Clips are held out, not captions: one may also be a held-out clip's.
        rows = {caption: row for caption, row in zip(clips.captions(train), train, strict=True)}
        count = write_prompts(work, islice(select_distinct(rows), most), lambda texts: clips.text([rows[text] for text in texts]), **layout)
        swap_into_place(work, out)
        return {"prompts": count}
    if params.generate.prompts_file and params.generate.prompts_file != HELDOUT:
        shown += read_prompts(params.generate.prompts_file)
    prompts = PromptSplit(source, params.prompts, shown)
    encoder, progress = CaptionEncoder(params.text, "prompts"), track.progress(most or prompts.total, unit="prompt")

    def embed(texts: list[str]) -> Tensor:
        embedded = encoder.encode(texts)
        progress.update(len(texts))
        return embedded

    count = write_prompts(work, prompts, embed, **layout)
    prompts.write_heldout(work / HELDOUT.name)
    swap_into_place(work, out)
    progress.close()
    encoder.cache.sweep()
    track.facts |= {"prompts_encoded": encoder.cache.new_entries}
    return {"prompts": count, "left_out": prompts.total - count - len(prompts.heldout), "heldout": len(prompts.heldout)}
