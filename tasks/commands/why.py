"""`cf why FILE`: what became of a file of the clips folder, rule by rule: its value, the threshold, and what decided."""

import argparse
from pathlib import Path

from cf_model.data.filter import keeps_bound, list_bounds
from tasks.files.json_lines import Row, read_json_lines
from tasks.params.load import load_params
from tasks.params.schema import Filter
from tasks.params.yaml_file import Refused

FOLDER = Path("data")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("cf why", description=__doc__)
    parser.add_argument("file", help="its name in clips.folder, or a clip's id or file in data/clips")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="default: params.yaml")
    args = parser.parse_args(argv)
    explain_file(args.file, load_params(args.params).filter, FOLDER)


def explain_file(name: str, rules: Filter, folder: Path) -> None:
    """Print the fate of a file; raise Refused if neither the manifest nor the list of what was left out has it."""
    manifest = folder / "manifest.jsonl"
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
    """Say whether a name is a row's: an id, a file in data/clips, a path in the user's folder, or the end of a path to it."""
    source = row.get("source")
    return name in (row.get("id"), row.get("file"), source) or (source is not None and Path(name).as_posix().endswith(f"/{source}"))


def describe_fate(row: Row, rules: Filter) -> str:
    """Describe a row of the manifest in lines of text."""
    place = f", from second {row['start'] / max(row['fps'], 1e-9):.2f}" if row.get("start") else ""
    fate = f"accepted, {row['split']}" if row["kept"] else f"rejected, {row['reason']}: {row['rule']}"
    lines = [f"{row.get('source', row['file'])} ({row['id']}{place}): {fate}"]
    if row["frames"]:
        lines.append(f"  {row['frames']} frames at {row['fps']:g} fps, {row['seconds']:g} s, {row['width']}x{row['height']}")
    lines += [f"  {row[key]}" for key in ("stream", "note") if row.get(key)]
    for reason, (what, comparison, bound) in list_bounds(rules).items():
        if reason in row["values"]:
            value = row["values"][reason]
            sign = " " if keeps_bound(value, comparison, bound) else "!"
            lines.append(f"{sign} {reason:<10} {value:>10.4f} {comparison:>2} {bound:<8g} {what}")
    return "\n".join(lines)
