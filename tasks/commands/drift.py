"""`cf drift`: new clips against the training set, by the values that the filter has measured; a page, and which rules moved."""

from cf_model.data.filter import list_bounds
from cf_model.evaluate.clip_drift import compare_clips, draw_page, say_drift
from tasks.files.atomic import write_atomically
from tasks.files.json_lines import read_json_lines, write_json
from tasks.files.options import parse_options
from tasks.params.load import load_params
from tasks.params.yaml_file import Refused


def main(argv: list[str]) -> None:
    args = parse_options("drift", argv, __doc__)
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
