"""`cf check-golden`: this code's model, memory, schedule, losses and rollouts against what Self-Forcing and LongLive computed."""

from pathlib import Path

from cf_model.golden.check import FAMILIES, compare_case, list_cases
from cf_model.golden.vectors import BrokenVectors, GoldenVectors
from tasks.files.options import parse_options
from tasks.params.yaml_file import Refused


def main(argv: list[str]) -> None:
    try:
        check_folder(parse_options("check-golden", argv).folder)
    except BrokenVectors as error:
        raise Refused(str(error)) from None


def check_folder(folder: Path) -> None:
    """Print a line for every case of the folder. Raises BrokenVectors for a broken folder, ValueError for a case beyond its tolerance."""
    golden, failed = GoldenVectors(folder), []
    print(f"{'case':<28}{'arrays':>7}  {'largest difference':<20}{'tolerance':<18}")
    for case, tolerance, compared in list_cases(golden, golden.load_model()):
        found = compare_case(tolerance, compared)
        said = f"FAIL at {found.culprit}" if found.culprit else "ok"
        print(f"{case:<28}{found.arrays:>7}  {found.largest:<20.2g}{tolerance!s:<18}{said}", flush=True)
        failed += [case] if found.culprit else []
    if absent := [family for family in FAMILIES if not golden.find_names(rf"{family}[._].*")]:
        print(f"not in {folder}, so not checked: {', '.join(absent)}")
    if unread := golden.list_unread():
        print(f"in {folder}, but no case reads it: {', '.join(unread)}")
    if failed:
        raise ValueError(f"{len(failed)} of {folder}'s cases differ by more than their tolerance: {', '.join(failed)}")
