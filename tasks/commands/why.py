"""`cf why FILE`: what became of a file of the clips folder, rule by rule: its value, the threshold, and what decided."""

from pathlib import Path

from cf_model.data.clip_manifest import describe_fate
from tasks.files.json_lines import Row, read_json_lines
from tasks.files.options import parse_options
from tasks.params.load import load_params
from tasks.params.schema import Filter
from tasks.params.yaml_file import Refused

FOLDER = Path("data")


def main(argv: list[str]) -> None:
    args = parse_options("why", argv, __doc__)
    explain_file(args.file, load_params(args.params).filter, FOLDER)


def explain_file(name: str, rules: Filter, folder: Path) -> None:
    """Print the fate of a file; raise Refused if neither the manifest nor the list of what was left out has it."""
    refused = folder / "refused.jsonl"  # of a newer run of the filter, which was refused
    manifest = refused if refused.is_file() else folder / "manifest.jsonl"
    if not manifest.is_file():
        raise Refused(f"{manifest} is not there; run the stages clips and filter first")
    if rows := [row for row in read_json_lines(manifest) if names_row(name, row)]:
        for row in rows:
            print(describe_fate(row, rules))
        return
    left_out = [row for row in read_json_lines(folder / "clips/left_out.jsonl", missing_ok=True) if names_row(name, row)]
    if not left_out:
        others = folder / "clips/left_out.jsonl"
        raise Refused(f"{name} is in neither {manifest} nor {others}; name a file as clips.folder has it, or an id")
    for row in left_out:
        print(f"{row['source']} was left out: {row['why']}")


def names_row(name: str, row: Row) -> bool:
    """Say whether a name is a row's: an id, a file in data/clips, one in the user's folder, or a path to either."""
    files = [file for file in (row.get("file"), row.get("source")) if file]
    return name in (row.get("id"), *files) or any(Path(name).as_posix().endswith(f"/{file}") for file in files)
