"""What the filter looks up in a file gives the answers of the same search and split in memory, to the bit."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cf_model.data import clip_pool, duplicates
from cf_model.data.clip_manifest import ManifestDraft
from cf_model.data.clip_pool import ClipPool
from cf_model.data.duplicates import DuplicateIndex, Likeness, list_words
from cf_model.data.measures import SIGNATURE_RATE
from cf_model.data.scratch import CACHE_KIB, open_scratch
from tasks.files.json_lines import dump_json_lines


class IndexInMemory:
    """The search as a dictionary and a counter do it."""

    def __init__(self) -> None:
        self.clips: dict[str, np.ndarray] = {}
        self.places: dict[int, list[tuple[str, int]]] = defaultdict(list)

    def add(self, name: str, signature: np.ndarray) -> None:
        self.clips[name] = signature[::SIGNATURE_RATE]
        for second, words in zip(*list_words(self.clips[name]), strict=True):
            for word in words:
                self.places[int(word)].append((name, int(second)))

    def find_closest(self, signature: np.ndarray) -> Likeness | None:
        best = None
        for mirrored, mine in ((False, signature), (True, signature[:, :, ::-1])):
            votes: Counter[tuple[str, int]] = Counter()
            for place, words in zip(*list_words(mine), strict=True):
                for word in words:
                    if len(found := self.places.get(int(word), ())) <= duplicates.CROWDED:
                        votes.update((name, int(place) - SIGNATURE_RATE * second) for name, second in found)
            for (name, shift), shared in votes.most_common(duplicates.COMPARED):
                if shared >= duplicates.LEAST_SHARED and (likeness := self.compare(name, mine, shift, mirrored)):
                    best = likeness if best is None or likeness.distance < best.distance else best
        return best

    def compare(self, name: str, mine: np.ndarray, shift: int, mirrored: bool) -> Likeness | None:
        theirs = self.clips[name]
        places = np.arange(len(theirs)) * SIGNATURE_RATE + shift
        both = (places >= 0) & (places < len(mine))
        if both.sum() < max(1, duplicates.LEAST_OVERLAP * min(len(theirs), len(mine) / SIGNATURE_RATE)):
            return None
        away = np.abs(theirs[both].astype(np.int16) - mine[places[both]])
        return Likeness(name, float(away.mean(dtype=np.float64)), mirrored, float(both.sum()))


def draw_signature(rng: np.random.Generator, pictures: np.ndarray) -> np.ndarray:
    """Pictures of a small stock, so that many words are shared, at many distances in time and as often as others."""
    drawn = pictures[rng.integers(0, len(pictures), rng.integers(1, 60))]
    drawn = drawn[:, :, ::-1] if rng.random() < 0.3 else drawn
    return np.clip(drawn + rng.integers(-2, 3, drawn.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("crowded", "compared"), [(2000, 24), (25, 3), (1, 24)])
def test_the_search_in_a_file_is_the_search_in_memory(crowded: int, compared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "CROWDED", crowded)
    monkeypatch.setattr(duplicates, "COMPARED", compared)
    found = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        pictures = rng.integers(0, 256, (12, 8, 8, 3)).astype(np.int16)
        pictures[0] = 90  # flat: no words
        theirs, ours = IndexInMemory(), DuplicateIndex()
        for number in range(20):
            signature = draw_signature(rng, pictures)
            found.append(theirs.find_closest(signature))
            assert ours.find_closest(signature) == found[-1]
            theirs.add(f"clip-{number}", signature)
            ours.add(f"clip-{number}", signature)
    assert any(found) and None in found and (crowded == 1 or any(one and one.mirrored for one in found))


def split_in_memory(rows: list[dict[str, Any]], heldout: int, latents: int) -> None:
    accepted = sorted((row for row in rows if row["kept"]), key=lambda row: hashlib.sha256(row["id"].encode()).digest())
    able = [row for row in accepted if row["latents"] >= latents]
    first = list({row["caption"]: row for row in reversed(able)}.values())[::-1]
    unique = {row["id"] for row in first}
    chosen = {row["file"] for row in [*first, *(row for row in able if row["id"] not in unique)][:heldout]}
    for row in accepted:
        row["split"] = "heldout" if row["file"] in chosen else "train"


@pytest.mark.parametrize("seed", range(40))
def test_the_manifest_in_a_file_is_the_manifest_in_memory(seed: int) -> None:
    """Its rows in their order, the split, and the counts; captions and files are shared by several clips."""
    draft, rows, rng = ManifestDraft(), [], np.random.default_rng(seed)
    heldout, latents, clips = (int(rng.integers(most)) for most in (8, 6, 26))
    for number in range(clips):
        reason = ("frozen", "blurred", "aesthetic", None, None, None)[rng.integers(6)]
        caption, file, length = (int(rng.integers(least, most)) for least, most in ((0, 5), (0, 30), (1, 10)))
        row = {"id": f"clip-{number}", "file": f"{file}.mp4", "caption": f"«{caption}»\u2028", "latents": length, "seconds": length / 3}
        row |= {"kept": reason is None, "reason": reason, "rule": "a", "split": None, "values": {"cut": 0.1, "a": float("nan")}}
        rows.append(row)
        draft.add(rows[-1])
    assert json.dumps(list(draft)) == json.dumps(rows)
    draft.split_heldout(heldout, latents)
    split_in_memory(rows, heldout, latents)
    assert json.dumps(list(draft)) == json.dumps(rows)
    counts, accepted = draft.count_reasons(), [row for row in rows if row["kept"]]
    assert counts["clips"] == len(rows) and counts["kept"] == len(accepted)
    assert counts["kept_seconds"] == sum(row["seconds"] for row in accepted)
    for name in ("train", "heldout"):
        assert counts[name] == sum(row["split"] == name for row in rows)
    reasons = Counter(row["reason"] for row in rows if not row["kept"])
    assert {name: counts.get(f"rejected_{name}", 0) for name in reasons} == reasons
    with pytest.raises(ValueError) as refused:
        draft.check_accepted("clips", len(accepted), held=("base.window", 2))
    assert ", ".join(f"{number} {reason}" for reason, number in reasons.most_common()) in str(refused.value)


def test_rows_are_written_as_they_were_judged(tmp_path: Path) -> None:
    draft = ManifestDraft(open_scratch(tmp_path))
    row = {"id": "a", "file": "a.mp4", "caption": '«мост»\u2028"', "latents": None, "seconds": None}
    rows = [row | {"kept": False, "reason": "unreadable", "rule": "a", "split": None, "values": {"cut": 0.1}} for _ in range(3)]
    draft.add(*rows)
    draft.write(tmp_path / "manifest.jsonl")
    assert (tmp_path / "manifest.jsonl").read_text() == dump_json_lines(rows, ensure_ascii=False)
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.jsonl"]


def test_a_database_leaves_no_file_and_holds_little_in_memory(tmp_path: Path) -> None:
    database = open_scratch(tmp_path)
    database.execute("CREATE TABLE rows (number INTEGER PRIMARY KEY, content)")
    for _ in range(5):
        database.execute("INSERT INTO rows VALUES (NULL, zeroblob(?))", (CACHE_KIB * 1024,))
    assert list(tmp_path.iterdir()) == []
    assert database.execute("SELECT sum(length(content)) FROM rows").fetchone() == (5 * CACHE_KIB * 1024,)
    assert database.execute("PRAGMA cache_size").fetchone() == (-CACHE_KIB,)


class Payloads(dict[str, bytes]):
    """A cache in memory."""

    def put(self, content: str, payload: bytes) -> None:
        self[content] = payload


@pytest.mark.parametrize("known", [0.0, 0.5, 0.95])
def test_a_pool_looks_ahead_only_so_far_and_gives_every_result_once_and_in_order(known: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of clips; processes answer in any order, and one clip takes longer than all others."""
    rng, looked_at, computed = np.random.default_rng(0), [0], Counter[int]()

    def answer(task: Callable[[int], bytes], queue: deque[tuple[int, int]], **_: object) -> Iterator[tuple[int, bytes]]:
        begun: list[tuple[int, int]] = []
        while queue or begun:
            while queue and len(begun) < 2:
                begun.append(queue.popleft())
            quick = [place for place, (_, clip) in enumerate(begun) if clip != 7] or [0]
            number, clip = begun.pop(int(rng.choice(quick)))
            computed[clip] += 1
            yield number, task(clip)

    def list_clips(count: int) -> Iterator[tuple[str, int]]:
        for clip in range(count):
            looked_at[0] = clip
            yield f"content {clip}", clip

    monkeypatch.setattr(clip_pool, "work_off_queue", answer)
    cache = Payloads({f"content {clip}": b"%d" % clip for clip in range(3000) if rng.random() < known and clip != 7})
    there = {int(payload) for payload in cache.values()}
    furthest = 0
    for number, payload in enumerate(ClipPool(2, 60.0).compute_payloads(cache, list_clips(3000), lambda clip: b"%d" % clip)):
        assert payload == b"%d" % number
        furthest = max(furthest, looked_at[0] - number)
    assert number == 2999 and furthest < clip_pool.AHEAD
    assert computed == Counter(set(range(3000)) - there), "what the cache knows is not computed, and all else once"
    assert known or furthest <= clip_pool.UNDER_WAY * 2
