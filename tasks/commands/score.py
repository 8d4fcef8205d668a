"""`cf score`, also `cf evaluate --videos`: a folder of videos scored by the protocols of both papers, a cell a video and metric.

A second start goes on where the first was interrupted, and scores anew only what has changed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cf_model.data.video_folder import VideoFolder
from cf_model.evaluate.cells import expand_lines, fold_cells, refuse_duplicates
from tasks.files.atomic import write_atomically
from tasks.files.json_lines import dump_json_lines, load_json_object, read_json_lines
from tasks.files.options import parse_options
from tasks.files.settings import read_settings
from tasks.files.videos import VIDEO_SUFFIXES
from tasks.files.words import count_things
from tasks.params.yaml_file import Refused, refuse_errors

Cell = dict[str, Any]
PROTOCOLS = ("vbench", "vbench-long", "vbench-competition", "windows", "own")


def main(argv: list[str]) -> None:
    args = parse_options("score", argv, __doc__)
    rows = list_rows(args.videos, args.manifest, args.prompts)
    if (args.chunk is None) != (args.window is None):
        raise Refused("--chunk and --window go together: seams are looked for at chunk borders and at the window's length")
    if args.repeats < 1 or min(args.chunk or 1, args.window or 1) < 1:
        raise Refused("--repeats, --chunk and --window are whole numbers from 1 on")

    from cf_model.device import choose_device
    from cf_model.metrics.judges import open_judge
    from cf_model.metrics.trace import open_networks
    from cf_model.scoring import Scoring, describe_scores, score_rows

    key = read_settings().judge_key
    with refuse_errors():
        networks = open_networks(args.weights, choose_device())
        judge = open_judge(args.judge, args.judge_model, key.get_secret_value() if key else None, choose_device()) if args.judge else None
    how = Scoring(args.protocol or PROTOCOLS, args.fps, args.chunk, args.window, args.repeats, args.timeout)
    with refuse_errors(f"; or remove {args.out} to begin anew"):
        cells = score_on(rows, args.out, lambda finished: score_rows(rows, args.videos, networks, judge, how, finished, args.features))
    print(*describe_scores(cells), sep="\n")
    failed = sum(cell["metric"] is None for cell in cells)
    print(f"{args.out}: {count_things(len(cells), 'cell')} of {count_things(len(rows), 'video')}, {failed} not scored")


def score_on(rows: list[dict[str, Any]], out: Path, score: Callable[[list[Cell]], Iterator[list[Cell]]]) -> list[Cell]:
    """Score videos and write the cells to `out`, whole or not at all; return them in the order of the rows.

    Each scored video is kept beside `out` until then, because the next start of an interrupted one goes on with it.
    """
    begun, by_file = out.with_name(f"{out.name}.begun"), dict[str, list[Cell]]()
    earlier = [expand_lines(read_json_lines(out, missing_ok=True), str(out))]
    earlier.append(expand_lines(read_json_lines(begun, missing_ok=True, growing=True), str(begun), growing=True))
    for cell in (cell for some in earlier for cell in some):
        by_file.setdefault(cell["file"], []).append(cell)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(begun, dump_json_lines(fold_cells(earlier[1])))
    with begun.open("a") as file:
        for scored in score([cell for some in by_file.values() for cell in some]):
            if scored != by_file.get(scored[0]["file"]):
                by_file[scored[0]["file"]] = scored
                file.write(dump_json_lines(fold_cells(scored)))
                file.flush()
    cells = [cell for row in rows for cell in by_file[row["file"]]]
    refuse_duplicates(cells, str(out))
    write_atomically(out, dump_json_lines(fold_cells(cells)))
    begun.unlink()
    return cells


def list_rows(folder: Path, manifest: Path | None, prompts: Path | None) -> list[dict[str, Any]]:
    """List the videos to score with their prompts; Refused for what contradicts itself, before anything is decoded."""
    from cf_model.metrics.manifest import check_rows

    if not folder.is_dir():
        raise Refused(f"--videos {folder} is no folder; name one that holds videos")
    texts = load_json_object(prompts) if prompts else {}
    if manifest:
        with refuse_errors():
            return check_rows(read_json_lines(manifest), folder, texts, str(manifest), str(prompts or "--prompts, not given,"))
    rows = [{"file": file.relative_to(folder).as_posix()} for file in VideoFolder(folder, VIDEO_SUFFIXES).videos]
    if not rows:
        raise Refused(f"--videos {folder} holds no video; name another folder")
    return rows
