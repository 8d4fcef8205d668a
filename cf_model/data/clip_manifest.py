"""The manifest that the filter writes: a row for each clip that was judged, and what follows from all rows together."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from cf_model.codec.interface import latent_frames, video_frames

from .filter import REASONS, FilterRules, Part, Rejection, describe_part, keeps_bound, list_bounds
from .measures import FileMeasures

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


def check_accepted(rows: Sequence[Row], clips: str, heldout: int, *, held: tuple[str, int]) -> None:
    """Raise ValueError, with the reasons of rejection, if the accepted clips are too few, or too few are long enough to be held out.

    `held`: the latent frames that every held-out clip must have, after the parameters that say so.
    """
    rejected = [row for row in rows if not row["kept"]]
    accepted = [row for row in rows if row["kept"]]
    counts = ", ".join(f"{number} {reason}" for reason, number in Counter(row["reason"] for row in rejected).most_common())
    first = f"; the first: {rejected[0].get('source', rejected[0]['file'])}, {rejected[0]['rule']}" if rejected else ""
    why = f"{counts or 'there is none to reject'}{first}"
    if not accepted:
        raise ValueError(f"no clip of {clips} passes the filter ({why}); add clips, or change filter in params.yaml")
    if len(accepted) <= heldout:
        problem = f"filter.heldout is {heldout}, but only {len(accepted)} of {clips} pass the filter ({why})"
        raise ValueError(f"{problem}; hold out fewer, or add clips")
    long = [row for row in accepted if row["latents"] >= held[1]]
    if len(long) < heldout:
        name, latents = held
        problem = f"filter.heldout is {heldout}, but only {len(long)} clips have {video_frames(latents)} frames, which {name} needs"
        raise ValueError(f"{problem}; hold out fewer, or add longer clips")


def check_longest(rows: Sequence[Row], longest: tuple[str, int]) -> None:
    """Raise ValueError if no training clip has the latent frames that `longest` names, after the parameters that say so.

    Only after the split: the longest accepted clip may be held out.
    """
    name, latents = longest
    most = max((row["latents"] for row in rows if row["split"] == "train"), default=0)
    if most < latents:
        problem = f"{name} is {latents} latents, so {video_frames(latents)} frames, but the longest training clip has {most}"
        raise ValueError(f"{problem} latents; add longer clips, or lower it")


def split_heldout(rows: list[Row], heldout: int, latents: int) -> None:
    """Set `split` of the accepted clips; held-out ones have at least `latents` latent frames.

    # Choice: by a hash of the id, so that new clips move few others between the sets; and different captions first, so
    # that the evaluation's prompts differ. All accepted parts of a file are on the same side.
    """
    accepted = sorted((row for row in rows if row["kept"]), key=lambda row: hashlib.sha256(row["id"].encode()).digest())
    able = [row for row in accepted if row["latents"] >= latents]
    first = list({row["caption"]: row for row in reversed(able)}.values())[::-1]
    unique = {row["id"] for row in first}
    chosen = {row["file"] for row in [*first, *(row for row in able if row["id"] not in unique)][:heldout]}
    for row in accepted:
        row["split"] = "heldout" if row["file"] in chosen else "train"


def count_reasons(rows: Sequence[Row]) -> dict[str, float]:
    """Return the stage's metrics: clips accepted, their seconds and splits, and rejections by reason."""
    reasons = Counter(row["reason"] for row in rows if not row["kept"])
    accepted = [row for row in rows if row["kept"]]
    return {
        "clips": len(rows),
        "kept": len(accepted),
        "kept_seconds": sum(row["seconds"] for row in accepted),
        "train": sum(row["split"] == "train" for row in accepted),
        "heldout": sum(row["split"] == "heldout" for row in accepted),
        **{f"rejected_{reason}": reasons[reason] for reason in (*REASONS, *sorted(reasons.keys() - set(REASONS)))},
    }


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
