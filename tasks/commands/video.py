"""`cf video`: a prompt in, a video file out, with a model folder and without the pipeline. `cf generate --model` is its old name.

With --prompts-file the answer is a folder with a video for each line of the file, which a second start completes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cf_model.data.prompts import iterate_prompts
from cf_model.data.video import grow_video, growing_path
from cf_model.timed_prompts import split_timed_prompts
from tasks.files.atomic import open_partial, write_atomically
from tasks.files.hashes import compute_dvc_md5
from tasks.files.json_lines import dump_json_lines, load_json_object, read_json_lines
from tasks.files.options import parse_options
from tasks.params.yaml_file import Refused, refuse_errors

if TYPE_CHECKING:
    from cf_model.pipeline import Chunk, ContextForcingPipeline


def main(argv: list[str]) -> None:
    args = parse_options("video", argv)
    refuse_impossible(args)

    import torch

    from cf_model.continued_clip import read_clip
    from cf_model.device import choose_device
    from cf_model.folder import change_values
    from cf_model.pipeline import ContextForcingPipeline

    torch.set_num_threads(args.threads)
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(True, warn_only=True)
    fast: dict[str, Any] = {"light_decoder": args.light_decoder, **dict.fromkeys(args.fast, True)}
    pipe = ContextForcingPipeline.from_pretrained(args.model, args.attention, args.dtype, **fast)
    if args.memory:
        pipe.change_memory(change_values(pipe.recipe.memory, args.memory, "--memory "))
    pipe = pipe.to(choose_device())
    with refuse_errors():
        clip = args.continue_from and read_clip(args.continue_from, pipe.recipe, resize=args.resize)
    if args.prompts_file:
        make_videos(pipe, clip, args)
    else:
        make_video(pipe, [(0.0, args.prompt), *args.at], clip, args.out, args)


def refuse_impossible(args: argparse.Namespace) -> None:
    """Raise Refused for options that can be refused before a model is loaded."""
    if args.threads < 1:
        raise Refused(f"--threads is {args.threads}; use 1 or more")
    if args.prompts_file:
        if args.at:
            raise Refused("--at goes with --prompt; a line of --prompts-file states its own times, as in: a[5s] | b[10s]")
        for number, line in iterate_prompts(args.prompts_file):  # to its end, because a bad line must be refused now, not after a night
            try:
                split_timed_prompts(line, args.seconds)
            except ValueError as error:
                raise Refused(f"{args.prompts_file} line {number}: {error}") from None
    else:
        if args.out.suffix != ".mp4":
            raise Refused(f"--out is {args.out}; name a file that ends in .mp4")
        if args.out.exists():
            raise Refused(f"{args.out} is already there; name another file, or remove it")
    try:
        args.at = [(float(second), words) for second, words in args.at]
    except ValueError:
        raise Refused(f"--at {' '.join(args.at[0])} does not begin with a time; write --at SECONDS TEXT") from None


def make_video(
    pipe: ContextForcingPipeline, timed: list[tuple[float, str]], clip: np.ndarray | None, out: Path, args: argparse.Namespace
) -> None:
    """Make a video from (second, prompt) pairs, with the memory strip as --memory-strip says. Nothing is written before the first chunk."""
    from cf_model import memory_strip
    from cf_model.request import usable_frames

    fps = pipe.recipe.fps
    chunks = pipe.chunks(timed, seconds=args.seconds, seed=args.seed, switch=args.switch, keep_sink=not args.new_sink, continue_from=clip)
    new, used = round(args.seconds * fps), usable_frames(pipe.recipe, clip)
    if clip is not None:
        print(f"goes on from the last {used} of the clip's {len(clip)} frames")
    seconds, rows = (used + new) / fps, list[dict[str, Any]]()
    trace = out.with_name(f"{out.stem}.memory.partial.jsonl")

    def note(row: dict[str, Any]) -> None:
        rows.append(row)
        if args.memory_strip == "beside":
            with trace.open("w" if len(rows) == 1 else "a", encoding="utf-8") as file:
                file.write(dump_json_lines([row], ensure_ascii=False))

    burned = pipe.recipe.memory if args.memory_strip == "burn" else None
    pictures = memory_strip.show_memory(show_progress(chunks, new, fps, out), note, fps=fps, seconds=seconds, burned=burned)
    first = next(pictures)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        grow_video(out, chain([first], pictures), fps=fps, crf=args.crf)
    except BaseException:
        print(f"stopped early; what was made is in {growing_path(out)}", file=sys.stderr)
        raise
    if args.memory_strip == "beside":
        with open_partial(out.with_name(f"{out.stem}.memory.png")) as picture:
            memory_strip.draw_timeline(rows, picture, seconds)
        trace.replace(out.with_name(f"{out.stem}.memory.jsonl"))


def show_progress(chunks: Iterator[Chunk], frames: int, fps: int, out: Path) -> Iterator[Chunk]:
    """Yield the chunks while a bar shows the frames of new video, and how many seconds of video are made in a second."""
    from tasks.runner.track import Progress

    bar, began, done = Progress(out.name, frames, "frame", 0), time.monotonic(), 0
    for chunk in chunks:
        yield chunk
        if chunk.real:
            began = time.monotonic()
            continue
        done += len(chunk.frames)
        bar.update(len(chunk.frames), **{"seconds of video a second": done / fps / (time.monotonic() - began)})
    bar.close()


def make_videos(pipe: ContextForcingPipeline, clip: np.ndarray | None, args: argparse.Namespace) -> None:
    """Make NNNNN.mp4 for each line NNNNN of the file that has none yet, with index.jsonl, and settings.json for the next start."""
    from cf_model.request import plan_request

    positions = pipe.denoiser.transformer.config.rope_max_seq_len
    options = ("seconds", "seed", "crf", "memory_strip", "attention", "dtype", "threads", "resize", "switch", "new_sink", "fast")
    settings = {name: getattr(args, name) for name in options} | {
        "light_decoder": args.light_decoder and compute_dvc_md5(args.light_decoder),
        "model": compute_dvc_md5(args.model),
        "memory": asdict(pipe.recipe.memory),
        "continue_from": args.continue_from and compute_dvc_md5(args.continue_from),
    }
    finished = read_finished(args.out, settings)
    for number, words in iterate_prompts(args.prompts_file):
        try:
            timed = split_timed_prompts(words, args.seconds)
            plan_request(pipe.recipe, pipe.text, positions, timed, args.seconds, args.seed, args.switch, clip)
        except ValueError as error:
            raise Refused(f"{args.prompts_file} line {number}: {error}") from None
        if finished.get(number, words) != words:
            raise Refused(f"{args.prompts_file} line {number} is not the prompt that {args.out} holds a video of; name another --out")
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out / "settings.json", json.dumps(settings, indent=2) + "\n")
    for number, words in iterate_prompts(args.prompts_file):
        if number not in finished:
            out = args.out / f"{number:05d}.mp4"
            make_video(pipe, split_timed_prompts(words, args.seconds), clip, out, args)
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
    before = load_json_object(file)
    for name, value in settings.items():
        if before.get(name) != value:
            raise Refused(f"{out} was begun with another --{name.replace('_', '-')}; use the same, or name another --out")
    rows = read_json_lines(index, missing_ok=True, growing=True)
    if index.is_file():  # without the half line that a kill may have left
        write_atomically(index, dump_json_lines(rows, ensure_ascii=False))
    return {row["line"]: row["prompt"] for row in rows if (out / row["file"]).is_file()}
