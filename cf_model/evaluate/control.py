"""The memoryless control of stage 2 beside the context teacher's student: by which metrics they are compared, video by video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .cells import refuse_other_protocols
from .report import Results
from .run_comparison import list_differences

SHOWN = {  # suite -> metrics of the table, and whether down or up is better; "" for what stands beside a win
    "continuations": {"map_error_absent": "down", "map_error": "down", "speed": "", "diversity": "", "headings_covered": ""},
    "recall": {"recall_error_75": "down", "recall_error_90": "down", "slow_gain_75": "up", "slow_gain_90": "up", "context_effect_4s": "up"},
    "prompts": {"memory_ratio": "down", "other_heading": "", "speed": "", "sprite_recall": "", "diversity": ""},
}


def compare_students(read: Mapping[str, Results], student: str, *, resamples: int, seed: int) -> list[dict[str, Any]]:
    """Return a row for each metric of SHOWN: both students' means, and the paired difference with its interval, where videos have it.

    `read` has the results under `context` and `memoryless`, in each of which the system is called `student`. Raises ValueError if they
    were measured by different protocols.
    """
    refuse_other_protocols(read["context"].protocols, read["memoryless"].protocols, ("this run", "its control"))
    cells: dict[tuple[str, str, str], Mapping[tuple[str, int], float]] = {}
    means: dict[str, dict[str, Mapping[str, float]]] = {}
    for name, results in read.items():
        cells |= {(suite, name, metric): values for (suite, system, metric), values in results.cells.items() if system == student}
        for suite, systems in results.means.items():
            means.setdefault(suite, {})[name] = systems.get(student, {})
    return list_differences(Results(cells, means, resamples=resamples, seed=seed), "memoryless", "context", SHOWN)
