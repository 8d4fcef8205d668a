"""Judging files one after the other: each is split into parts, each part is held against the rules, and copies are found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .clip_manifest import Row, manifest_row
from .duplicates import DuplicateIndex
from .filter import FilterRules, ModelShape, Part, Rejection, find_broken_rule, find_duplicate, list_values, split_at_cuts
from .measures import FileMeasures
from .networks import ClipNetworks
from .subprocess_reader import Unreadable

# What is read of a row of clips.jsonl; not `planted`, because that is the answer: a filter that reads it would prove nothing.
KEYS = ("id", "file", "caption", "source", "note", "refused", "from", "to")


@dataclass
class ClipJudge:
    """Judge of a collection, which remembers the accepted clips to recognise their copies."""

    rules: FilterRules
    shape: ModelShape
    networks: ClipNetworks
    hash_file: Callable[[Path], str]  # of its content
    accepted: DuplicateIndex = field(default_factory=DuplicateIndex)

    def judge_file(self, about: Row, path: Path, file: FileMeasures | Unreadable) -> list[Row]:
        """Return the manifest's rows of a file, one for each part that is judged. `about` is its row of clips.jsonl."""
        about = {key: about[key] for key in KEYS if about.get(key) is not None}
        if sentence := about.get("refused"):
            about = {key: value for key, value in about.items() if key != "refused"}
            return [manifest_row(about, None, {}, Rejection("caption", None, sentence))]
        if isinstance(file, Unreadable):
            sentence = file.sentence.replace(path.name, about.get("source", path.name))  # the name that the user knows
            return [manifest_row(about, None, {}, Rejection("unreadable", None, sentence))]
        parts, rows = split_at_cuts(file, self.rules, about.get("from"), about.get("to")), []
        for number, part in enumerate(parts, 1):
            row = about if len(parts) == 1 else about | {"id": f"{about['id']}-{number:03d}"}
            row, values, rejection = self._judge_part(row, path, file, part)
            signature = file.sign_part(part.first, part.end)
            twin = None
            if rejection is None:
                twin, rejection = find_duplicate(signature, self.accepted, self.rules)
            if twin:
                values["duplicate"] = twin.distance
            if rejection is None:
                self.accepted.add(row["id"], signature)
            rows.append(manifest_row(row, (file, part), values, rejection))
        return rows

    def _judge_part(self, row: Row, path: Path, file: FileMeasures, part: Part) -> tuple[Row, dict[str, float], Rejection | None]:
        """Return a part's row, perhaps with a caption by a network, its value for every rule, and its rejection or None."""
        values = list_values(file, part, row["caption"], self.shape)
        rejection = find_broken_rule(file, part, values, self.rules, self.shape)
        try:
            if rejection and rejection.reason == "caption" and self.rules.captioner:
                caption = self.networks.describe_clip(path, self.hash_file(path), part)
                row = row | {"caption": caption, "note": f"caption by {self.rules.captioner.code}"}
                values = list_values(file, part, caption, self.shape)
                rejection = find_broken_rule(file, part, values, self.rules, self.shape)
            if rejection is None and self.rules.networks:
                values |= self.networks.score_clip(path, self.hash_file(path), part, row["caption"])
                rejection = find_broken_rule(file, part, values, self.rules, self.shape)
        except ValueError as error:  # the file changed since it was measured
            rejection = Rejection("unreadable", None, str(error))
        return row, values, rejection
