"""`cf sample`: the videos of a system for a set of prompts, with a manifest that `cf score` reads. A second start makes what is missing."""

import json
import time
from pathlib import Path
from typing import Any

from cf_model.data.video import write_video
from cf_model.evaluate.cells import hash_facts
from tasks.files.atomic import write_atomically
from tasks.files.hashes import compute_dvc_md5
from tasks.files.json_lines import dump_json_lines, load_json_object, read_json_lines, write_json
from tasks.files.options import parse_options
from tasks.params.yaml_file import Refused, refuse_errors


def main(argv: list[str]) -> None:
    args = parse_options("sample", argv, __doc__)

    from cf_model.device import choose_device
    from cf_model.systems.adapters import identify_system, open_system
    from cf_model.systems.sampling import describe_cost, find_rate, list_tasks, parse_settings, read_prompts, refuse_request

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
