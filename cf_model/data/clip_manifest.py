"""The manifest that the filter writes: a row for each clip that was judged, and what follows from all rows together."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cf_model.codec.interface import latent_frames, video_frames

from .filter import REASONS, FilterRules, Part, Rejection, describe_part, keeps_bound, list_bounds
from .measures import FileMeasures
from .scratch import open_scratch

Row = dict[str, Any]


def manifest_row(about: Row, found: tuple[FileMeasures, Part] | None, values: dict[str, float], rejection: Rejection | None) -> Row:
    """Return a clip's row of the manifest; `found` is None for a file that can't be read."""
    facts: dict[str, Any] = dict.fromkeys(("fps", "frames", "width", "height", "seconds", "start", "length", "latents"))
    if found:
        file, part = found
        of_file = file.facts
        length = of_file.length if part.length == file.frames else part.length / file.fps
        facts = {"fps": round(of_file.fps, 4), "frames": of_file.frames, "width": of_file.width, "height": of_file.height}
        facts |= {"seconds": round(float(length), 4), **describe_part(file, part), "latents": latent_frames(part.length)}
        facts |= {"stream": of_file.stream} if of_file.stream else {}
    value = None if rejection is None or rejection.value is None else round(rejection.value, 4)
    reason, rule = (rejection.reason, rejection.rule) if rejection else (None, None)
    judged = {"kept": rejection is None, "reason": reason, "value": value, "rule": rule, "split": None}
    return about | facts | judged | {"values": {name: round(float(number), 4) for name, number in values.items()}}


@dataclass
class ManifestDraft:
    """The manifest's rows in the order in which clips are judged, in a database, and what follows from all of them together.

    Memory does not grow with the rows: SQLite sorts and groups, in a file where its cache is too small.
    """

    database: sqlite3.Connection = field(default_factory=open_scratch)

    def __post_init__(self) -> None:
        self.database.execute(
            "CREATE TABLE rows (number INTEGER PRIMARY KEY, kept, reason, latents, seconds, split, file, caption, digest, json)"
        )

    def add(self, *rows: Row) -> None:
        """Append rows of the manifest."""
        for row in rows:
            caption, digest = (hashlib.sha256(row[key].encode()).digest() for key in ("caption", "id"))
            values = (*(row[key] for key in ("kept", "reason", "latents", "seconds", "split", "file")), caption, digest, json.dumps(row))
            self.database.execute("INSERT INTO rows VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)

    def __iter__(self) -> Iterator[Row]:
        """Yield all rows, with their splits once split_heldout has decided them."""
        for text, split in self.database.execute("SELECT json, split FROM rows ORDER BY number"):
            yield json.loads(text) | {"split": split}

    def write(self, path: Path) -> None:
        """Write all rows to a file as lines of JSON, whole or not at all."""
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self)
        partial.replace(path)

    def check_accepted(self, clips: str, heldout: int, *, held: tuple[str, int]) -> None:
        """Raise ValueError, with the reasons of rejection, if the accepted clips are too few, or too few are long enough to be held out.

        `held`: the latent frames that every held-out clip must have, after the parameters that say so.
        """
        name, latents = held
        counts = ", ".join(f"{number} {reason}" for reason, number in self._count_rejections())
        rejected = self.database.execute("SELECT json FROM rows WHERE NOT kept ORDER BY number LIMIT 1").fetchone()
        row = json.loads(rejected[0]) if rejected else {}
        first = f"; the first: {row.get('source', row['file'])}, {row['rule']}" if row else ""
        why = f"{counts or 'there is none to reject'}{first}"
        accepted = self._count("kept")
        if not accepted:
            raise ValueError(f"no clip of {clips} passes the filter ({why}); add clips, or change filter in params.yaml")
        if accepted <= heldout:
            problem = f"filter.heldout is {heldout}, but only {accepted} of {clips} pass the filter ({why})"
            raise ValueError(f"{problem}; hold out fewer, or add clips")
        long = self._count("kept AND latents >= ?", latents)
        if long < heldout:
            problem = f"filter.heldout is {heldout}, but only {long} clips have {video_frames(latents)} frames, which {name} needs"
            raise ValueError(f"{problem}; hold out fewer, or add longer clips")

    def split_heldout(self, heldout: int, latents: int) -> None:
        """Set `split` of the accepted clips; held-out ones have at least `latents` latent frames.

        # Choice: by a hash of the id, so that new clips move few others between the sets; and different captions first, so
        # that the evaluation's prompts differ. All accepted parts of a file are on the same side.
        """
        self.database.execute(
            """WITH able AS (SELECT file, caption, digest FROM rows WHERE kept AND latents >= ?),
            captions AS (SELECT min(digest) AS least, max(digest) AS most FROM able GROUP BY caption),
            chosen AS (SELECT file FROM able LEFT JOIN captions ON digest = least ORDER BY least IS NULL, coalesce(most, digest) LIMIT ?)
            UPDATE rows SET split = CASE WHEN file IN chosen THEN 'heldout' ELSE 'train' END WHERE kept""",
            (latents, heldout),
        )

    def check_longest(self, longest: tuple[str, int]) -> None:
        """Raise ValueError if no training clip has the latent frames that `longest` names, after the parameters that say so.

        Only after the split: the longest accepted clip may be held out.
        """
        name, latents = longest
        [most] = self.database.execute("SELECT ifnull(max(latents), 0) FROM rows WHERE split = 'train'").fetchone()
        if most < latents:
            problem = f"{name} is {latents} latents, so {video_frames(latents)} frames, but the longest training clip has {most}"
            raise ValueError(f"{problem} latents; add longer clips, or lower it")

    def count_reasons(self) -> dict[str, float]:
        """Return the stage's metrics: clips accepted, their seconds and splits, and rejections by reason."""
        reasons = Counter(dict(self._count_rejections()))
        return {
            "clips": self._count("true"),
            "kept": self._count("kept"),
            "kept_seconds": sum(seconds for (seconds,) in self.database.execute("SELECT seconds FROM rows WHERE kept ORDER BY number")),
            "train": self._count("split = 'train'"),
            "heldout": self._count("split = 'heldout'"),
            **{f"rejected_{reason}": reasons[reason] for reason in (*REASONS, *sorted(reasons.keys() - set(REASONS)))},
        }

    def _count_rejections(self) -> list[tuple[str, int]]:
        """Return (reason, clips), the most frequent reason first, and of equals the one that was met first."""
        ask = "SELECT reason, count(*) FROM rows WHERE NOT kept GROUP BY reason ORDER BY count(*) DESC, min(number)"
        return self.database.execute(ask).fetchall()

    def _count(self, condition: str, *values: float) -> int:
        [number] = self.database.execute(f"SELECT count(*) FROM rows WHERE {condition}", values).fetchone()
        return int(number)


def describe_fate(row: Row, rules: FilterRules) -> str:
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
