"""`cf vbench`: a folder of videos in VBench's own naming and, with --python, the scores of its official script in its own environment."""

import os
import shutil
import subprocess
from pathlib import Path

from tasks.commands.score import list_rows
from tasks.files.hashes import hash_file
from tasks.files.json_lines import dump_json_lines, load_json_object, write_json
from tasks.files.options import parse_options
from tasks.files.words import count_things
from tasks.params.yaml_file import Refused

# VBench's script and its libraries get these of our environment, and none of its secrets
HANDED_ON = ("PATH", "HOME", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "HF_HOME", "HF_HUB_OFFLINE", "VBENCH_CACHE_DIR", "TMPDIR", "LANG")


def main(argv: list[str]) -> None:
    from cf_model.evaluate.cells import fold_cells
    from cf_model.metrics.manifest import describe_row
    from cf_model.metrics.vbench_folder import name_videos, read_results

    args = parse_options("vbench", argv, __doc__)
    rows = list_rows(args.videos, args.manifest, args.prompts)
    names = name_videos(rows)
    if absent := [file for file in names if not (args.videos / file).is_file()]:
        raise Refused(f"{args.videos / absent[0]} is not there; correct {args.manifest}")
    if args.out.exists():
        raise Refused(f"--out {args.out} is there already; name a new folder")
    if (args.python is None) != (args.checkout is None) or (args.python is None) != (not args.dimension):
        raise Refused("--checkout, --python and --dimension go together: without them only the folder is made")
    if args.python and not (args.python.is_file() and (args.checkout / "evaluate.py").is_file()):
        raise Refused(f"{args.python} and {args.checkout / 'evaluate.py'} must both be there; name VBench's python and checkout")
    (args.out / "videos").mkdir(parents=True)
    for file, (name, _) in names.items():
        shutil.copyfile(args.videos / file, args.out / "videos" / name)
    write_json(args.out / "prompts.json", dict(names.values()), indent=1, ensure_ascii=False)
    prompts = count_things(len({prompt for _, prompt in names.values()}), "prompt")
    print(f"{args.out / 'videos'}: {count_things(len(names), 'video')} of {prompts}")
    if args.python:
        results = run_script(args.out.resolve(), args.python.absolute(), args.checkout, args.dimension)
        facts = {row["file"]: describe_row(row) | {"md5": hash_file(args.videos / row["file"])} for row in rows}
        cells = [facts[cell["file"]] | cell for cell in read_results(load_json_object(results), names)]
        (args.out / "scores.jsonl").write_text(dump_json_lines(fold_cells(sorted(cells, key=lambda cell: cell["file"]))))
        print(f"{args.out / 'scores.jsonl'}: {count_things(len(cells), 'line')}")


def run_script(out: Path, python: Path, checkout: Path, dimensions: list[str]) -> Path:
    """Run VBench's script on the folder and return the file of its results; Refused with its last line if it fails."""
    words = ["--videos_path", out / "videos", "--prompt_file", out / "prompts.json", "--output_path", out / "results"]
    command = [python, "evaluate.py", "--mode", "custom_input", *words, "--dimension", *dimensions]
    environment = {name: os.environ[name] for name in HANDED_ON if name in os.environ}
    done = subprocess.run(
        [str(word) for word in command], cwd=checkout, env=environment, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    found = sorted((out / "results").glob("*_eval_results.json"))
    if done.returncode or not found:
        last = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), "it wrote no results")
        raise Refused(f"VBench's script ended with code {done.returncode}: {last[:200]}; its folder is {out}, to run it by hand")
    return found[-1]
