"""`cf sample`: the videos of a system for a set of prompts, with a manifest that `cf score` reads. A second start makes what is missing."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from cf_model.data.video import write_video
from cf_model.evaluate.cells import hash_facts
from tasks.files.atomic import write_atomically
from tasks.files.hashes import compute_dvc_md5
from tasks.files.json_lines import dump_json_lines, load_json_object, read_json_lines, write_json
from tasks.params.yaml_file import Refused, refuse_errors

EXAMPLES = """Prompts are read from the files that their repositories publish: MovieGenVideoBench.txt (facebookresearch/MovieGenBench),
VBench_full_info.json (Vchitect/VBench), with --extended all_dimension_extended.txt; or any file of one prompt a line.
subsets: smoke 2 prompts x 1 seed, nightly 16 x 1, paper 100 x 5 (VBench: all 946 x 5), all. docs/systems.md lists the systems.

examples:
  cf sample --system ours --weights out/student --prompts MovieGenVideoBench.txt --seconds 60.5 --out videos/ours --dry-run
  cf sample --system wan2.1 --weights Wan2.1-T2V-1.3B-Diffusers --prompts MovieGenVideoBench.txt --subset nightly --out videos/wan
  cf score --videos videos/wan --manifest videos/wan/manifest.jsonl --weights weights --out scores.jsonl"""


def main(argv: list[str]) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("cf sample", description=__doc__, epilog=EXAMPLES, formatter_class=form)
    parser.add_argument("--system", required=True, metavar="NAME", help="as in docs/systems.md; a model of this project under any name")
    parser.add_argument("--weights", type=Path, required=True, metavar="DIR", help="its folder; nothing is downloaded")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE")
    parser.add_argument("--extended", type=Path, metavar="FILE", help="the prompts written out, which systems are given")
    parser.add_argument("--subset", choices=("smoke", "nightly", "paper", "all"), default="smoke", help="default: smoke")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each video; default: 5")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the videos and manifest.jsonl")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a keyword of the pipeline's call; may be repeated")
    parser.add_argument("--first-frames", type=Path, metavar="DIR", help="PROMPT_ID.png for each prompt, for systems that need one")
    parser.add_argument("--rate", type=float, help="frames a second of this machine, for the expected cost; default: as printed")
    parser.add_argument("--crf", type=int, default=16, choices=range(52), metavar="0-51", help="of H.264; default: 16")
    parser.add_argument("--dry-run", action="store_true", help="say what it costs, and end")
    args = parser.parse_args(argv)

    from cf_model.systems.adapters import identify_system, open_system
    from cf_model.systems.sampling import describe_cost, find_rate, list_tasks, parse_settings, read_prompts, refuse_request
    from tasks.parts.device import choose_device

    with refuse_errors():
        prompts = read_prompts(args.prompts, args.extended)
        tasks = list_tasks(prompts, args.subset)
        refuse_request(args.system, args.weights, tasks, args.seconds, args.rate, args.first_frames)
        changes, (_, fps) = parse_settings(args.set), identify_system(args.system, args.weights)
    rate, source = args.rate or find_rate(args.system), "--rate" if args.rate else "as Context Forcing's Table 2 prints it"
    print(describe_cost(tasks, round(args.seconds * fps), rate, source), flush=True)
    if args.dry_run:
        return
    with refuse_errors():
        system = open_system(args.system, args.weights, choose_device(), changes)
    settings = {"system": args.system, "weights": compute_dvc_md5(args.weights), "seconds": args.seconds, "crf": args.crf}
    settings |= {"prompts": hash_facts(dict(prompts.texts)), "settings": system.describe()}
    settings["first_frames"] = compute_dvc_md5(args.first_frames) if args.first_frames else None
    rows = begin_folder(args.out, settings, prompts.prompts)
    finished = {row["file"] for row in rows}
    for task in [task for task in tasks if task.file not in finished]:
        began = time.monotonic()
        image = args.first_frames / f"{task.prompt_id}.png" if args.first_frames else None
        video = system.make_video(task.text, seconds=args.seconds, seed=task.seed, image=image)
        seconds = time.monotonic() - began
        write_video(args.out / task.file, video, fps=system.fps, crf=args.crf)
        row = {"file": task.file, "prompt_id": task.prompt_id, "prompt": task.prompt, "seed": task.seed, "system": args.system}
        row |= {"fps": system.fps, "frames": len(video), "made_in": round(seconds, 2), "made_by": hash_facts(settings)}
        with (args.out / "manifest.jsonl").open("a", encoding="utf-8") as file:
            file.write(dump_json_lines([row], ensure_ascii=False))
        if not rows:
            print(describe_cost(tasks, len(video), round(len(video) / seconds, 3), "measured on the first video"), flush=True)
        rows.append(row)
    print(f"{args.out / 'manifest.jsonl'}: {len(rows)} videos, {len(rows) - len(finished)} of them new")


def begin_folder(out: Path, settings: dict[str, Any], prompts: Any) -> list[dict[str, Any]]:
    """Return the manifest's rows whose videos an earlier start has made; Refused for a folder of other settings or of something else."""
    stated, manifest = out / "settings.json", out / "manifest.jsonl"
    settings = json.loads(json.dumps(settings))
    if stated.is_file():
        before = load_json_object(stated)
        if changed := sorted(name for name in settings if before.get(name) != settings[name]):
            raise Refused(f"{out} was begun with another {changed[0]}, see {stated}; use the same, or name another --out")
    elif out.exists() and any(out.iterdir()):
        raise Refused(f"{out} is already there and not from an earlier run of this command; name another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(stated, settings, indent=1, ensure_ascii=False)
    write_json(out / "prompts.json", dict(prompts), indent=1, ensure_ascii=False)
    rows = [row for row in read_json_lines(manifest, missing_ok=True, growing=True) if (out / row["file"]).is_file()]
    write_atomically(manifest, dump_json_lines(rows, ensure_ascii=False))
    return rows
