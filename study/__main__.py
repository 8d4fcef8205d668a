"""`python -m study run | hours | page`: `make study` and `make evidence`; `node` is what study/dvc.yaml runs."""

import argparse
import sys
from pathlib import Path

from study import forecast, nodes, page, run
from study.cells import measure_cell
from study.plan import read_plan
from tasks.params.yaml_file import Refused


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m study", description=__doc__)
    parser.add_argument("--profile", help="instead of the plan's, such as small on a GPU; its cells are kept apart")
    verbs = parser.add_subparsers(dest="verb", required=True)
    all_cells = verbs.add_parser("run", help="makes the cells that are missing, in the order of the plan; a second call goes on")
    all_cells.add_argument(
        "--jobs", type=int, default=run.count_jobs(), help="seeds that are trained at once; default: half of the cores, at most 2"
    )
    all_cells.add_argument("--group", action="append", help="only this group of the plan; may be repeated")
    verbs.add_parser("hours", help="what is missing, and about how long it takes by the committed run's seconds")
    verbs.add_parser("page", help="docs/evidence.md from the committed cells")
    node = verbs.add_parser("node", help="one stage of study/dvc.yaml")
    node.add_argument("stage")
    node.add_argument("name")
    node.add_argument("paths", nargs="*", type=Path)
    args = parser.parse_args(argv)
    plan = read_plan(profile=args.profile)
    if args.verb == "run":
        run.make_cells(plan, jobs=args.jobs, groups=args.group)
    elif args.verb == "hours":
        print(forecast.describe_hours(plan, forecast.list_missing(plan)))
    elif args.verb == "page":
        print(f"wrote {page.write_page(plan)}")
    elif args.stage == "clips":
        nodes.make_clips(plan, args.name)
    elif args.stage == "cell":
        measure_cell(plan, next(cell for cell in plan.cells if cell.name == args.name))
    else:
        nodes.train_model(plan, args.stage, args.name, *(path.resolve() for path in args.paths))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Refused as error:
        print(f"study: {error}", file=sys.stderr)
        sys.exit(2)
