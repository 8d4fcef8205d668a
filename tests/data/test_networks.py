"""Networks by an import path: asked about clips that pass every other rule, once each, and refused before any clip is read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import MagicMock

import numpy as np
import pytest

from cf_model.data.networks import PICTURES, SCORE, load_network, pick_pictures
from tasks import clips
from tasks import filter as filtering
from tasks.params.schema import Network, ScoringNetwork
from tests.test_clips import folder, rows
from tests.test_sources import film


class Brightness:
    """A stand-in for an aesthetic score: how bright a clip is, times the number in its weights."""

    asked: ClassVar[list[str]] = []

    def __init__(self, weights: Path) -> None:
        self.factor = float(weights.read_text())

    def score_clip(self, pictures: np.ndarray, caption: str) -> float:
        assert pictures.shape == (PICTURES, 32, 32, 3) and pictures.dtype == np.uint8
        self.asked.append(caption)
        return self.factor * float(pictures.mean())


class Words:
    def __init__(self, weights: Path) -> None:
        pass

    def describe_clip(self, pictures: np.ndarray) -> str:
        return f"a scene in\n{len(pictures)} pictures"


HERE = "tests.data.test_networks"


def run(tmp_path: Path, at_least: float) -> list[dict[str, Any]]:
    p = folder(tmp_path / "raw")
    network = ScoringNetwork(name="brightness", code=f"{HERE}:Brightness", weights=tmp_path / "factor.txt", at_least=at_least)
    captioner = Network(code=f"{HERE}:Words", weights=tmp_path / "factor.txt")
    p.filter = p.filter.model_copy(update={"networks": [network], "captioner": captioner, "min_words": 2})
    metrics = filtering.run(p, MagicMock(), clips=tmp_path / "clips", out=tmp_path / "manifest.jsonl")
    found = rows(tmp_path / "manifest.jsonl")
    assert metrics.get("rejected_brightness", 0) == sum(row["reason"] == "brightness" for row in found)
    return found


def test_scores_are_rules_and_a_poor_caption_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CF_KEPT", str(tmp_path / "kept"))
    (tmp_path / "factor.txt").write_text("2")
    for seed, name in enumerate(("a red bar.mp4", "b blue disc.mp4", "IMG_1.mp4")):
        film(tmp_path / "raw" / name, seed)
    clips.run(folder(tmp_path / "raw"), MagicMock(), out=tmp_path / "clips")
    found = {row["source"]: row for row in run(tmp_path, 0.0)}
    assert all(row["kept"] for row in found.values()) and sorted(Brightness.asked) == sorted(row["caption"] for row in found.values())
    assert found["IMG_1.mp4"]["caption"] == "a scene in 8 pictures" and found["IMG_1.mp4"]["note"] == f"caption by {HERE}:Words"
    scores = {name: row["values"]["brightness"] for name, row in found.items()}
    darkest = min(scores, key=lambda name: scores[name])
    between = round(sum(sorted(scores.values())[:2]) / 2, 3)
    again = {row["source"]: row for row in run(tmp_path, between)}
    assert [name for name, row in again.items() if not row["kept"]] == [darkest] and len(Brightness.asked) == 3
    assert again[darkest]["rule"] == f"score of brightness >= {between}"


@pytest.mark.parametrize(
    ("code", "weights", "why"),
    [
        ("no_such_package:Net", "w", r"can't be imported \(No module named 'no_such_package'\); install it"),
        ("os:system", "w", "is no class with a method score_clip"),
        (f"{HERE}:Words", "w", "is no class with a method score_clip"),
        (f"{HERE}:Brightness", "gone", "gone, which is not there; fetch it by hand"),
    ],
)
def test_a_network_that_is_not_here_is_a_sentence(tmp_path: Path, code: str, weights: str, why: str) -> None:
    (tmp_path / "w").write_text("1")
    with pytest.raises(ValueError, match=rf"filter\.networks\.x\.\w+ is .*{why}"):
        load_network("filter.networks.x", SimpleNamespace(code=code, weights=tmp_path / weights), SCORE)


def test_pictures_are_even_over_a_part(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", frames=100)
    shown = list(pick_pictures(path, first=20, length=50, height=32, width=32, fps=16))
    everything = list(pick_pictures(path, first=0, length=100, height=32, width=32, fps=16))
    assert len(shown) == len(everything) == PICTURES and np.abs(shown[0].astype(int) - everything[0]).mean() > 1
