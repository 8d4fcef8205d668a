"""`make study`: the missing cells by DVC, a seed to each process. A second call goes on where the first stopped."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from study.forecast import describe_hours, is_made, list_missing
from study.nodes import ROOT, STUDY, list_targets, write_nodes
from study.plan import Cell, Plan
from tasks.files.dvc_rwlock import mend_rwlock
from tasks.params.yaml_file import Refused


def count_jobs() -> int:
    """Return how many seeds are trained at once unless it is stated: two where there are two cores, because a process uses one."""
    return min(2, os.cpu_count() or 1)


def make_cells(plan: Plan, *, jobs: int, groups: Iterable[str] | None = None) -> None:
    """Make the missing cells, in the order of the plan. Each failure is named at the end; a cell of another seed goes on."""
    missing = list_missing(plan, groups)
    print(describe_hours(plan, missing), flush=True)
    write_nodes(plan)
    if mended := mend_rwlock(STUDY):
        print(mended, flush=True)
    # the clips of a world serve all seeds, so they are made before seeds are trained side by side
    for world in dict.fromkeys(cell.world for cell in missing):
        reproduce(f"clips@{plan.profile}-{world}")
    failed: list[str] = []
    stop = threading.Event()

    def work(cells: list[Cell]) -> None:
        for cell in cells:
            if stop.is_set():
                return
            try:
                if not is_made(plan, cell):
                    print(f"cell {cell.name}", flush=True)
                    reproduce(*list_targets(plan, cell))
            except Refused:
                failed.append(cell.name)
                return  # a seed's next cell mostly needs what failed

    # group by group, because the plan says which comes first; in a group each process has whole seeds, and no two write the same model
    for queue in split_by_group(plan, missing):
        with ThreadPoolExecutor(jobs) as pool:
            try:
                list(pool.map(work, queue))
            except KeyboardInterrupt:
                stop.set()
                raise
    if failed:
        raise Refused(f"{len(failed)} of {len(missing)} cells failed, the first {failed[0]}, see above; `make study` goes on from there")


def split_by_group(plan: Plan, cells: list[Cell]) -> list[list[list[Cell]]]:
    """Split cells by group, and within a group by seed, in the order of the plan."""
    out = []
    for group in plan.groups.values():
        own = [cell for cell in cells if cell.world == group.world and cell.seed in group.seeds and cell.arm in group.arms]
        out.append([part for seed in group.seeds if (part := [cell for cell in own if cell.seed == seed])])
    return out


def reproduce(*targets: str) -> None:
    """Let DVC make these targets, and nothing that they need; raises Refused where one of them fails, which has said why.

    Nothing that they need, because to look at the clips again DVC wants them for itself, and another seed's training reads them.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1"}
    if subprocess.run(["dvc", "--wait-for-lock", "repro", "--single-item", "--quiet", *targets], cwd=STUDY, env=environment).returncode:
        raise Refused(f"{targets[-1]} failed")
