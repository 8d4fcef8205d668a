"""Where a report's numbers come from: the facts of its card, and the sentences of its red banner.

Run, commit, hardware and cost are not here: they differ between two runs that make the same bytes, so the page reads them from
../runtime/runtime.js when it is opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .figures import Row, item_key
from .report import Results


def list_provenance(
    params: Any, index: Sequence[Row], protocols: Collection[str], hashes: Mapping[str, str], weights: Collection[str]
) -> list[tuple[str, list[str]]]:
    """List the facts of the card: name, and lines of text. `hashes`: path -> DVC's md5, as dvc.lock has it."""
    prompts = sorted({row["prompt"] for row in index if row["system"] != "real"})
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:12]
    done, expected = len([row for row in index if row["system"] != "real"]), count_expected(params)
    facts = [
        ("videos", [f"{done} of {expected}"]),
        ("prompts", [f"{len(prompts)} different, SHA-256 of their sorted lines {digest}"] if prompts else []),
        ("seeds", [", ".join(map(str, params.generate.seeds)) + f"; of the training {params.seed}"]),
        ("protocols", sorted(protocols)),
        ("networks that score", sorted(weights) or ["none: every metric is computed from pixels and from what the worlds were drawn with"]),
        ("made of (DVC's md5)", [f"{path} {md5}" for path, md5 in hashes.items()]),
    ]
    return [(name, lines) for name, lines in facts if lines]


def count_expected(params: Any) -> int:
    """Return the number of videos that params.yaml asks for, real ones not counted."""
    asked = params.generate
    return len(asked.systems) * asked.prompts * len(asked.seeds) + sum(asked.count_continued(name) for name in asked.continuations)


def list_warnings(params: Any, index: Sequence[Row], results: Results, failed: Sequence[str]) -> list[str]:
    """Return the sentences of the red banner: what is partial, failed, or measured or trained with a substitute."""
    made, expected = len([row for row in index if row["system"] != "real"]), count_expected(params)
    context, trained = params.stage2.teacher.context, params.teacher.view.context
    scored = {item for (_, system, _), values in results.cells.items() if system != "real" for item, _ in values}
    unscored = {item_key(row) for row in index if row["system"] != "real"} - scored if scored else set()
    substitutes = sorted({metric for _, _, metric in results.cells if "@" in metric})
    sentences = {
        f"Partial: {made} of the {expected} videos that params.yaml asks for are here.": index and made < expected,
        f"Partial: {len(unscored)} prompts have videos without any score.": unscored,
        f"Failed: {len(failed)} videos could not be scored ({'; '.join(failed[:3])}).": failed,
        f"Substituted: {', '.join(substitutes)}. What stands behind the @ took the place of the network that the metric is named for; "
        "these numbers can't be compared with published ones.": substitutes,
        f"Substituted: stage 2's teacher was shown the context {context} and had been trained on {trained}.": context
        not in ("none", trained),
        "Smoke: this profile only shows that everything runs, and trains too little to learn.": params.profile == "smoke",
    }
    return [sentence for sentence, holds in sentences.items() if holds]
