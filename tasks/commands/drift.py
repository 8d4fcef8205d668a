"""`cf drift`: new clips against the training set, by the values that the filter has measured; a page, and which rules moved."""

import argparse
from pathlib import Path

from cf_model.data.filter import list_bounds
from cf_model.evaluate.clip_drift import compare_clips, draw_page, say_drift
from tasks.files.atomic import write_atomically
from tasks.files.json_lines import read_json_lines, write_json
from tasks.params.load import load_params
from tasks.params.yaml_file import Refused

EXAMPLES = """examples, after the stages clips and filter have read the folder:
  ls videos/tonight-*.mp4 | xargs -n1 basename > new.txt && cf drift --new new.txt --out drift.html"""


def main(argv: list[str]) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("cf drift", description=__doc__, epilog=EXAMPLES, formatter_class=form)
    parser.add_argument("--new", type=Path, required=True, help="text file: names of the new clips in clips.folder, one a line")
    parser.add_argument("--manifest", type=Path, default=Path("data/manifest.jsonl"), help="default: data/manifest.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="the page; NAME.json beside it has its numbers")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="default: params.yaml")
    args = parser.parse_args(argv)
    for path, way in ((args.new, "write it"), (args.manifest, "run the stages clips and filter first")):
        if not path.is_file():
            raise Refused(f"{path} is not there; {way}")
    new, manifest = set(args.new.read_text(encoding="utf-8").splitlines()), read_json_lines(args.manifest)
    findings = compare_clips(manifest, new, list_bounds(load_params(args.params).filter))
    sentence = say_drift(findings, sum(row.get("source") in new for row in manifest))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, draw_page(findings, sentence))
    numbers = [{key: value for key, value in one.items() if key != "svg"} for one in findings]
    write_json(args.out.with_suffix(".json"), {"sentence": sentence, "findings": numbers}, indent=1)
    print(sentence)
