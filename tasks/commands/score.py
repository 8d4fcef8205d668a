"""`cf score`, also `cf evaluate --videos`: a folder of videos scored by the protocols of both papers, a cell a video and metric.

A second start goes on where the first was interrupted, and scores anew only what has changed."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cf_model.evaluate.cells import expand_lines, fold_cells, refuse_duplicates
from tasks.files.atomic import write_atomically
from tasks.files.json_lines import dump_json_lines, load_json_object, read_json_lines
from tasks.files.settings import read_settings
from tasks.files.videos import list_videos
from tasks.files.words import count_things
from tasks.params.yaml_file import Refused, refuse_errors

Cell = dict[str, Any]
PROTOCOLS = ("vbench", "vbench-long", "vbench-competition", "windows", "own")
EXAMPLES = """A manifest is a file of JSON lines: {"file": "a.mp4", "prompt": "a cat", "fps": 16, "system": "ours", "seed": 0}; only file is
needed. With --prompts FILE ({"id": "text"}), "prompt_id" may stand for "prompt". Without a manifest all videos of DIR are scored.

Without --weights, consistency is that of pooled pixels, and each score says so behind an @ (subject_consistency@pooled-8x8).
`cf fetch-weights --out weights` fetches DINO, DINOv2 and CLIP. Nothing is downloaded here.

examples:
  cf score --videos samples/long --out scores.jsonl
  cf score --videos DIR --manifest DIR/manifest.jsonl --weights weights --chunk 3 --window 21 --out scores.jsonl
  cf score --videos DIR --judge http://127.0.0.1:8000/v1 --judge-model MODEL --out scores.jsonl      (CF_JUDGE_KEY is its key)"""


def main(argv: list[str]) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("cf score", description=__doc__, epilog=EXAMPLES, formatter_class=form)
    parser.add_argument("--videos", type=Path, required=True, metavar="DIR", help="a folder of videos")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the scores, as JSON lines")
    parser.add_argument("--manifest", type=Path, metavar="FILE", help="which videos, and their prompts")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a JSON object of prompts by id")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="folders dino, dinov2, clip and clip-large, as far as they are there")
    parser.add_argument("--protocol", action="append", choices=PROTOCOLS, help="may be given several times; default: all")
    parser.add_argument("--fps", type=float, help="resample all videos to this rate; default: each at its own")
    parser.add_argument("--chunk", type=int, metavar="LATENTS", help="latent frames of a chunk; with --window, seams are scored")
    parser.add_argument("--window", type=int, metavar="LATENTS", help="latent frames of the window that the videos were made with")
    parser.add_argument("--judge", metavar="heuristic|FILE|DIR|URL", help="for Visual Stability: a rule of thumb, recorded answers "
                        "({video: text}), a model's folder, or an OpenAI-compatible endpoint")  # fmt: skip
    parser.add_argument("--judge-model", metavar="NAME", help="the model's name at the endpoint")
    parser.add_argument("--repeats", type=int, default=1, help="ratings a video; default: 1")
    parser.add_argument("--timeout", type=float, default=600, help="seconds in which a video must be readable; default: 600")
    parser.add_argument("--features", type=Path, metavar="DIR", help="keep what is measured of each video here (10 MB a minute of DINO and "
                        "CLIP): other protocols and judges then need no decoding")  # fmt: skip
    parser.add_argument("--threads", default="1", help="threads of a CPU; default: 1")
    args = parser.parse_args(argv)
    rows = list_rows(args.videos, args.manifest, args.prompts)
    if (args.chunk is None) != (args.window is None):
        raise Refused("--chunk and --window go together: seams are looked for at chunk borders and at the window's length")
    if args.repeats < 1 or min(args.chunk or 1, args.window or 1) < 1:
        raise Refused("--repeats, --chunk and --window are whole numbers from 1 on")

    from cf_model.metrics.judges import open_judge
    from cf_model.metrics.trace import open_networks
    from cf_model.scoring import Scoring, describe_scores, score_rows
    from tasks.parts.device import choose_device

    key = read_settings().judge_key
    with refuse_errors():
        networks = open_networks(args.weights, choose_device())
        judge = open_judge(args.judge, args.judge_model, key.get_secret_value() if key else None, choose_device()) if args.judge else None
    how = Scoring(args.protocol or PROTOCOLS, args.fps, args.chunk, args.window, args.repeats, args.timeout)
    with refuse_errors(f"; or remove {args.out} to begin anew"):
        cells = score_on(rows, args.out, lambda finished: score_rows(rows, args.videos, networks, judge, how, finished, args.features))
    print(*describe_scores(cells), sep="\n")
    failed = sum(cell["metric"] is None for cell in cells)
    print(f"{args.out}: {count_things(len(cells), 'cell')} of {count_things(len(rows), 'video')}, {failed} not scored")


def score_on(rows: list[dict[str, Any]], out: Path, score: Callable[[list[Cell]], Iterator[list[Cell]]]) -> list[Cell]:
    """Score videos and write the cells to `out`, whole or not at all; return them in the order of the rows.

    Each scored video is kept beside `out` until then, because the next start of an interrupted one goes on with it.
    """
    begun, by_file = out.with_name(f"{out.name}.begun"), dict[str, list[Cell]]()
    earlier = [expand_lines(read_json_lines(out, missing_ok=True), str(out))]
    earlier.append(expand_lines(read_json_lines(begun, missing_ok=True, growing=True), str(begun), growing=True))
    for cell in (cell for some in earlier for cell in some):
        by_file.setdefault(cell["file"], []).append(cell)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(begun, dump_json_lines(fold_cells(earlier[1])))
    with begun.open("a") as file:
        for scored in score([cell for some in by_file.values() for cell in some]):
            if scored != by_file.get(scored[0]["file"]):
                by_file[scored[0]["file"]] = scored
                file.write(dump_json_lines(fold_cells(scored)))
                file.flush()
    cells = [cell for row in rows for cell in by_file[row["file"]]]
    refuse_duplicates(cells, str(out))
    write_atomically(out, dump_json_lines(fold_cells(cells)))
    begun.unlink()
    return cells


def list_rows(folder: Path, manifest: Path | None, prompts: Path | None) -> list[dict[str, Any]]:
    """List the videos to score with their prompts; Refused for what contradicts itself, before anything is decoded."""
    from cf_model.metrics.manifest import check_rows

    if not folder.is_dir():
        raise Refused(f"--videos {folder} is no folder; name one that holds videos")
    texts = load_json_object(prompts) if prompts else {}
    if manifest:
        with refuse_errors():
            return check_rows(read_json_lines(manifest), folder, texts, str(manifest), str(prompts or "--prompts, not given,"))
    rows = [{"file": file.relative_to(folder).as_posix()} for file in list_videos(folder)]
    if not rows:
        raise Refused(f"--videos {folder} holds no video; name another folder")
    return rows
