"""Are the chunks that the slow memory keeps the ones with news? Held-out clips of `tiny`, whose true headings are known.

  python -m benchmarks kept_frames [--project . --weights models/causal_init]     a minute, after `make repro`

A model remembers held-out clips as if it had made them, once with the profile's settings and once with the other kind of similarity
at the tau that keeps as many. Each tested chunk has a distance: how far the camera turned since the chunk before, in units of the
world. Writes results/kept-frames.json (that distance for kept and for skipped chunks, over all clips and within each clip, since
fast and slow clips differ) and docs/kept-frames.png (the first frame of each tested chunk of ten clips; kept ones are framed).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.sample_strips import read_frames
from cf_model.codec.interface import video_frames
from cf_model.data import worlds
from cf_model.data.latents import Latents
from cf_model.model import wan
from cf_model.model.memory import Memory, MemorySpec, empty_memory
from tasks.files.atomic import write_atomically as write
from tasks.params import load

CLIPS, SIZE, GAP, LEFT, LINE = 10, 56, 3, 150, 20


def turn_between_chunks(heading: list[float], chunk: int, count: int) -> np.ndarray:
    """How far the camera turned from each chunk to the next, in units, by the mean heading of a chunk's frames."""
    turn = np.exp(2j * np.pi * np.array(heading) / worlds.PANORAMA)
    edges = [video_frames(chunk * number) if number else 0 for number in range(count + 1)]
    means = np.array([turn[first:last].mean() for first, last in pairwise(edges)])
    return np.abs(np.angle(means[1:] / means[:-1])) / (2 * np.pi) * worlds.PANORAMA


@torch.no_grad()
def remember_clips(model: Any, x: torch.Tensor, text: torch.Tensor, spec: MemorySpec, chunk: int) -> tuple[np.ndarray, list[int]]:
    """The similarity by which each tested chunk is judged, [clips, tested], and the tested chunks' numbers."""
    memory: Memory = empty_memory(replace(spec, scope="global"))
    found, tested = [], []
    for number, part in enumerate(x.split(chunk, dim=1)):
        memory = model.remember(part, text, memory)
        if spec.is_tested(number) and memory.similarity is not None:
            found.append(memory.similarity.mean(dim=1))
            tested.append(number)
    return torch.stack(found, dim=1).numpy(), tested


def compare(similarity: np.ndarray, tau: float, turned: np.ndarray) -> dict[str, float]:
    """Mean turn of kept and of skipped chunks; within clips: the mean, over clips that have both, of their difference.

    The rank correlation needs no tau: 1 where a clip's chunks are as unlike the chunk before as the camera turned.
    """
    kept = similarity < tau
    ranks = [np.corrcoef((-row).argsort().argsort(), turn.argsort().argsort())[0, 1] for row, turn in zip(similarity, turned, strict=True)]
    both = [(row, turn) for row, turn in zip(kept, turned, strict=True) if row.any() and not row.all()]
    within = [turn[row].mean() - turn[~row].mean() for row, turn in both]
    values = {"share kept": kept.mean(), "turn of kept": turned[kept].mean(), "turn of skipped": turned[~kept].mean()}
    values |= {"difference within a clip": np.mean(within), "clips where kept turn more": np.mean(np.array(within) > 0)}
    values |= {"rank correlation within a clip": np.mean(ranks), "clips that keep nothing": float((~kept.any(axis=1)).sum())}
    values |= {"least kept of a clip": kept.mean(axis=1).min(), "most kept of a clip": kept.mean(axis=1).max()}
    return {name: round(float(value), 3) for name, value in values.items()}


def draw_kept(
    files: list[Path], captions: list[str], tested: list[int], kept: np.ndarray, turned: np.ndarray, seconds: float
) -> Image.Image:
    """A strip for each clip: the first frame of each tested chunk, framed if kept, and under it how far the camera had turned."""
    sheet = Image.new("RGB", (LEFT + len(tested) * (SIZE + GAP), LINE + len(files) * (SIZE + LINE + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    times = tuple(number * seconds for number in tested)
    for place, second in enumerate(times):
        pen.text((LEFT + place * (SIZE + GAP) + 4, 4), f"{second:g} s", fill="gray")
    for row, (file, caption) in enumerate(zip(files, captions, strict=True)):
        y = LINE + row * (SIZE + LINE + GAP)
        words = caption.replace(", the camera pans ", " ").removeprefix("a ").split(" in the ")
        pen.text((4, y + SIZE // 2 - 12), "\n".join(words), fill="black")
        for place, frame in enumerate(read_frames(file, times)):
            x, is_kept = LEFT + place * (SIZE + GAP), bool(kept[row, place])
            picture = frame.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            sheet.paste(picture if is_kept else Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.55), (x, y))
            if is_kept:
                pen.rectangle((x, y, x + SIZE - 1, y + SIZE - 1), outline=(200, 30, 30), width=3)
            pen.text((x + 14, y + SIZE + 3), f"{turned[row, place]:.1f}", fill="black" if is_kept else "gray")
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=Path("."), help="a checkout with data/ and models/; default: .")
    parser.add_argument("--weights", type=Path, default=None, help="default: models/causal_init of the project")
    parser.add_argument("--out", type=Path, default=HERE / "results/kept-frames.json")
    parser.add_argument("--picture", type=Path, default=HERE.parent / "docs/kept-frames.png")
    given = parser.parse_args()
    torch.set_num_threads(1)
    p, clips = load.load_params(HERE.parent / "profiles/tiny.yaml"), Latents(given.project / "data/latents")
    spec, chunk = p.causal_init.memory, p.causal_init.chunk
    truths = {row["id"]: row for row in map(json.loads, (given.project / "data/clips/clips.jsonl").read_text().splitlines())}
    rows = clips.rows("heldout")
    frames = min(clips.frames(row) for row in rows) // chunk * chunk
    model = wan.load_transformer(given.weights or given.project / "models/causal_init").eval()
    x, text = clips.window(rows, [0] * len(rows), frames), clips.text(rows)
    about = [truths[clips.clips[row]["id"]] for row in rows]
    turns = np.array([turn_between_chunks(row["truth"]["heading"], chunk, frames // chunk) for row in about])
    found: dict[str, Any] = {}
    for similarity in (spec.similarity, "raw" if spec.similarity == "centred" else "centred"):
        values, tested = remember_clips(model, x, text, replace(spec, similarity=similarity), chunk)  # type: ignore[arg-type]
        turned = turns[:, np.array(tested) - 1]
        tau = spec.tau if similarity == spec.similarity else float(np.quantile(values, found[spec.similarity]["share kept"]))
        found[similarity] = {"tau": round(tau, 4), "median": round(float(np.median(values)), 4), **compare(values, tau, turned)}
        if similarity == spec.similarity:
            files = [given.project / "data/clips" / row["file"] for row in about[:CLIPS]]
            captions = [row["caption"] for row in about[:CLIPS]]
            sheet = draw_kept(files, captions, tested, values < tau, turned, chunk * 4 / p.video.fps)
            sheet.save(given.picture, optimize=True)
    result = {"clips": len(rows), "chunks tested in each": len(tested), "memory": asdict(spec), "by similarity": found}
    write(given.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
