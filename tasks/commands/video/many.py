"""`cf video --prompts-file FILE`: a folder with a video for each line of the file, which a second start completes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cf_model.data.prompts import iterate_prompts
from tasks.files.atomic import write_atomically
from tasks.files.hashes import hash_content
from tasks.files.json_lines import dump_json_lines, read_json_lines
from tasks.params.yaml_file import Refused

if TYPE_CHECKING:
    from cf_model.pipeline import ContextForcingPipeline


def make_videos(pipe: ContextForcingPipeline, args: argparse.Namespace, make: Callable[[str, Path], None]) -> None:
    """Make NNNNN.mp4 for each line NNNNN of the file that has none yet, with index.jsonl, and settings.json for the next start."""
    from cf_model.request import check_prompt

    options = ("seconds", "seed", "crf", "memory_strip", "attention", "dtype", "threads", "resize")
    settings = {name: getattr(args, name) for name in options} | {
        "model": hash_content(args.model),
        "memory": asdict(pipe.recipe.memory),
        "continue_from": args.continue_from and hash_content(args.continue_from),
    }
    finished = read_finished(args.out, settings)
    for number, words in iterate_prompts(args.prompts_file):
        try:
            check_prompt(words, pipe.text)
        except ValueError as error:
            raise Refused(f"{args.prompts_file} line {number}: {error}") from None
        if finished.get(number, words) != words:
            raise Refused(f"{args.prompts_file} line {number} is not the prompt that {args.out} holds a video of; name another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out / "settings.json", json.dumps(settings, indent=2) + "\n")
    for number, words in iterate_prompts(args.prompts_file):
        if number not in finished:
            out = args.out / f"{number:05d}.mp4"
            make(words, out)
            # a line whose video was lost is made again and has two rows, of which the later one counts
            with (args.out / "index.jsonl").open("a", encoding="utf-8") as file:
                file.write(dump_json_lines([{"line": number, "prompt": words, "file": out.name}], ensure_ascii=False))


def read_finished(out: Path, settings: dict[str, Any]) -> dict[int, str]:
    """Return line -> prompt of the videos that an earlier start has made in `out`; refuse a folder of other settings."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return {}
    file, index = out / "settings.json", out / "index.jsonl"
    if not file.is_file():
        raise Refused(f"{out} is already there and not from an earlier run of this command; name another --out")
    before = json.loads(file.read_text())
    for name, value in settings.items():
        if before.get(name) != value:
            raise Refused(f"{out} was begun with another --{name.replace('_', '-')}; use the same, or name another --out")
    rows = read_json_lines(index, missing_ok=True, growing=True)
    if index.is_file():  # without the half line that a kill may have left
        write_atomically(index, dump_json_lines(rows, ensure_ascii=False))
    return {row["line"]: row["prompt"] for row in rows if (out / row["file"]).is_file()}
