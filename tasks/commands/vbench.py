"""`cf vbench`: a folder of videos in VBench's own naming and, with --python, the scores of its official script in its own environment."""

import shutil

from tasks.commands.score import list_rows
from tasks.files.hashes import hash_file
from tasks.files.json_lines import dump_json_lines, load_json_object, write_json
from tasks.files.options import parse_options
from tasks.files.words import count_things
from tasks.params.yaml_file import Refused, refuse_errors


def main(argv: list[str]) -> None:
    from cf_model.evaluate.cells import fold_cells
    from cf_model.metrics.manifest import describe_row
    from cf_model.metrics.vbench_folder import name_videos, read_results, run_script

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
        with refuse_errors():
            results = run_script(args.out.resolve(), args.python.absolute(), args.checkout, args.dimension)
        facts = {row["file"]: describe_row(row) | {"md5": hash_file(args.videos / row["file"])} for row in rows}
        cells = [facts[cell["file"]] | cell for cell in read_results(load_json_object(results), names)]
        (args.out / "scores.jsonl").write_text(dump_json_lines(fold_cells(sorted(cells, key=lambda cell: cell["file"]))))
        print(f"{args.out / 'scores.jsonl'}: {count_things(len(cells), 'line')}")
