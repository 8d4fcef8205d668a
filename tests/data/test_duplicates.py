"""A search that goes on from the run before finds what a search among all clips finds, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cf_model.data import duplicates
from cf_model.data.duplicates import DuplicateIndex, Likeness
from tests.data.test_bounded import draw_signature

Clip = tuple[str, np.ndarray]


def search(clips: Sequence[Clip], least: float, kept: Path | None) -> tuple[list[Likeness | None], int]:
    """Judge clips as the filter does, and return each one's most similar clip, and how many were searched for among all."""
    index, found = DuplicateIndex(kept=kept), []
    for name, signature in clips:
        found.append(index.find_closest(signature))
        if (likeness := found[-1]) is None or likeness.distance >= least:
            index.add(name, signature)
    index.earlier.save()
    return found, index.full_searches


def draw_clips(seed: int, count: int) -> list[Clip]:
    """Clips of a small stock of pictures, so that many share words and some are copies, with two of the very same pictures."""
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (12, 8, 8, 3)).astype(np.int16)
    pictures[0] = 90  # flat: no words
    clips = [(f"clip-{number:03d}", draw_signature(rng, pictures)) for number in range(count)]
    clips[count // 2] = (clips[count // 2][0], clips[3][1])
    return clips


@pytest.mark.parametrize(("crowded", "compared"), [(2000, 24), (2000, 3), (25, 3), (10, 24)])
@pytest.mark.parametrize("seed", range(6))
def test_searches_go_on_whatever_became_of_the_collection(
    seed: int, crowded: int, compared: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clips come, go, and change their order, and the threshold changes, from run to run."""
    monkeypatch.setattr(duplicates, "CROWDED", crowded)
    monkeypatch.setattr(duplicates, "COMPARED", compared)
    rng, stock = np.random.default_rng(seed), draw_clips(seed, 32)
    there, least, reused, alike = set(range(0, 32, 2)), 8.0, 0, 0
    order = list(range(32))
    for change in ("nothing", "come", "go", "both", "order", "threshold", "come", "all go", "both", "threshold"):
        outside = sorted(set(range(32)) - there)
        coming = set(rng.choice(outside, min(3, len(outside)), replace=False).tolist()) if change in ("come", "both") else set()
        going = set(rng.choice(sorted(there), 3, replace=False).tolist()) if change in ("go", "both") else set()
        there = (there | coming) - going if change != "all go" else set(outside)
        if change == "order":
            first, second = rng.choice(32, 2, replace=False)
            order[first], order[second] = order[second], order[first]
        least = {8.0: 0.0, 0.0: 30.0, 30.0: 8.0}[least] if change == "threshold" else least
        clips = [stock[number] for number in order if number in there]
        expected, _ = search(clips, least, None)
        found, full = search(clips, least, tmp_path / "searches")
        assert found == expected, change
        reused, alike = reused + len(clips) - full, alike + sum(one is not None for one in expected)
    assert reused and alike


@pytest.mark.parametrize("place", [0, 20, 40])
def test_a_new_clip_is_the_only_one_that_is_compared_with_all(place: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    clips = [(f"clip-{number:02d}", rng.integers(0, 256, (45, 8, 8, 3), np.uint8)) for number in range(41)]
    before = [clip for number, clip in enumerate(clips) if number != place]
    assert search(before, 8.0, tmp_path / "searches")[1] == 40
    assert search(before, 8.0, tmp_path / "searches")[1] == 0
    assert search(clips, 8.0, tmp_path / "searches")[1] == 1
    assert search(before, 8.0, tmp_path / "searches")[1] == 0


def test_a_damaged_file_of_searches_counts_as_absent(tmp_path: Path) -> None:
    clips, kept = draw_clips(1, 12), tmp_path / "searches"
    expected, _ = search(clips, 8.0, kept)
    [file] = tmp_path.iterdir()
    stored = bytearray(file.read_bytes())
    stored[len(stored) // 2] ^= 1
    file.write_bytes(stored)
    assert search(clips, 8.0, kept) == (expected, 12)
    assert search(clips, 8.0, kept) == (expected, 0) and len(list(tmp_path.iterdir())) == 1
