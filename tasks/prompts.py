"""Stage `prompts`: the prompts that students are trained on, embedded once: the training clips' captions, or those of a file."""

from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from cf_model.data.latents import Latents
from cf_model.data.prompt_writer import write_prompts
from cf_model.data.prompts import PromptSplit, read_prompts, select_distinct
from tasks.files.atomic import swap_into_place
from tasks.params.nightly import CAPTIONS, HELDOUT
from tasks.params.schema import Params
from tasks.parts.caption_encoder import open_caption_encoder
from tasks.runner.track import Track


def run(params: Params, track: Track, *, source: Path, latents: Path, out: Path) -> dict[str, float]:
    """Write data/prompts. `source` is the manifest, for the training clips' captions, or a file of prompts (start.prompts).

    Each prompt stands there once. Prompts of the files that the evaluation or a night shows are left out, and of a file also held-out
    clips' captions; heldout.txt has the share held out. The metric `also_heldout` counts the captions that held-out clips have, too.
    """
    clips, most = Latents(latents), params.prompts.most
    train, heldout = clips.rows("train"), clips.captions(clips.rows("heldout"))
    files = {params.generate.prompts_file, params.nightly.prompts_file} - {None, HELDOUT}
    shown = [prompt for file in files if file for prompt in read_prompts(file)]
    work, layout = track.work / "prompts", {"shard_mib": params.encode.shard_mib, "dtype": getattr(torch, params.encode.dtype)}
    if source == CAPTIONS:
        # The clips' captions are embedded already. Clips are held out, not captions: one may also be a held-out clip's.
        rows = {caption: row for caption, row in zip(clips.captions(train), train, strict=True)}
        captions = list(islice(select_distinct(rows, without=shown), most))
        count = write_prompts(work, captions, lambda texts: clips.text([rows[text] for text in texts]), **layout)
        swap_into_place(work, out)
        return {"prompts": count, "also_heldout": count - sum(1 for _ in select_distinct(captions, without=heldout))}
    prompts = PromptSplit(source, params.prompts, [*heldout, *shown])
    (encoder, cache), progress = open_caption_encoder(params.text, "prompts"), track.progress(most or prompts.total, unit="prompt")

    def embed(texts: list[str]) -> Tensor:
        embedded = encoder.encode(texts)
        progress.update(len(texts))
        return embedded

    count = write_prompts(work, prompts, embed, **layout)
    prompts.write_heldout(work / HELDOUT.name)
    swap_into_place(work, out)
    progress.close()
    cache.sweep()
    track.facts |= {"prompts_encoded": cache.new_entries}
    return {"prompts": count, "left_out": prompts.total - count - len(prompts.heldout), "heldout": len(prompts.heldout)}
