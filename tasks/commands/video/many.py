"""`cf generate --model DIR --prompts-file FILE`: a folder with one video a line, which a second start completes."""

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
from tasks.params.yaml_file import Refused

if TYPE_CHECKING:
    from cf_model.pipeline import ContextForcingPipeline


def make_videos(pipe: ContextForcingPipeline, args: argparse.Namespace, make: Callable[[str, Path], None]) -> None:
    """NNNNN.mp4 for line NNNNN of the file, and index.jsonl; settings.json says what they were made with."""
    from cf_model.request import check_prompt

    stated = ("seconds", "seed", "crf", "memory_strip", "attention", "dtype", "threads", "resize")
    settings = {name: getattr(args, name) for name in stated} | {
        "model": hash_content(args.model),
        "memory": asdict(pipe.recipe.memory),
        "continue_from": args.continue_from and hash_content(args.continue_from),
    }
    made = read_finished(args.out, settings)
    for number, words in iterate_prompts(args.prompts_file):
        try:
            check_prompt(words, pipe.text)
        except ValueError as error:
            raise Refused(f"{args.prompts_file} line {number}: {error}") from None
        if made.get(number, words) != words:
            raise Refused(f"{args.prompts_file} line {number} is not the prompt that {args.out} holds a video of; name another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out / "settings.json", json.dumps(settings, indent=2) + "\n")
    for number, words in iterate_prompts(args.prompts_file):
        if number not in made:
            out = args.out / f"{number:05d}.mp4"
            make(words, out)
            # a line whose video was lost is made again, and stands twice: the later row counts
            with (args.out / "index.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"line": number, "prompt": words, "file": out.name}, ensure_ascii=False) + "\n")


def read_finished(out: Path, settings: dict[str, Any]) -> dict[int, str]:
    """Line -> prompt of the videos that a run with the same settings has made here."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return {}
    stated, index = out / "settings.json", out / "index.jsonl"
    if not stated.is_file():
        raise Refused(f"{out} is already there and not from an earlier run of this command; name another --out")
    before = json.loads(stated.read_text())
    for name, value in settings.items():
        if before.get(name) != value:
            raise Refused(f"{out} was begun with another --{name.replace('_', '-')}; use the same, or name another --out")
    lines = index.read_text(encoding="utf-8").splitlines(keepends=True) if index.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]  # a kill may leave half a line
    if len(whole) < len(lines):
        write_atomically(index, "".join(whole))
    rows = [json.loads(line) for line in whole]
    return {row["line"]: row["prompt"] for row in rows if (out / row["file"]).is_file()}
