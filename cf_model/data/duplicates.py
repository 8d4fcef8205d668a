"""Copies among clips: whole or a part, mirrored or not, of another quality, size or frame rate.

A clip's signature is a picture of 8 x 8 blocks every quarter of a second. Of the clips accepted before, the picture of each whole second is
looked up by four 16-bit words: whether each block is brighter than the picture's median. Clips that share words at the same distance in
time are compared block by block. So a collection is searched in time that grows with its copies, and not with its square.

What a search found is kept (earlier_searches.py): a clip that an earlier run searched for is compared with new clips alone.
"""

from __future__ import annotations

import json
import math
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from .earlier_searches import FOUND, EarlierSearches, Found
from .measures import SIGNATURE_RATE
from .scratch import open_scratch

WORDS, WORD_BITS = 4, 16  # that a picture is looked up by
LEAST_SHARED = 2  # words that two clips must share at one distance in time before they are compared
COMPARED = 24  # clips, at most, that one is compared with: those that share most words
LEAST_OVERLAP = 0.5  # of the shorter clip, that two clips must have in common
FLAT = 2.0  # grey levels; pictures that differ less in themselves are not looked up, because all of them look alike
CROWDED = 2000  # pictures under one word; a word that more share tells nothing
SHIFT_BITS = 32  # below a clip's number, for a distance in time

Signature = UInt8[np.ndarray, "M y x 3"]


@dataclass(frozen=True)
class Likeness:
    """The most similar clip."""

    clip: str
    distance: float  # mean absolute difference of the blocks of what both show, 0..255
    mirrored: bool
    seconds: float  # that both show


class WordIndex:
    """Table of the pictures under each word; in memory are the words' counts alone, 1 MiB however many clips there are."""

    def __init__(self, database: sqlite3.Connection, table: str) -> None:
        self.database, self.table = database, table
        # a word's pictures, 8 bytes each, up to CROWDED + 1: the clip's number above SHIFT_BITS, minus where it stands in the clip
        database.execute(f"CREATE TABLE {table} (word INTEGER PRIMARY KEY, pictures BLOB)")
        self.counts = np.zeros(WORDS << WORD_BITS, np.int32)  # of stored pictures, by word

    def add(self, clip: int, seconds: Signature) -> None:
        """Add a clip's pictures at whole seconds, behind those of the clips before."""
        places, words = list_words(seconds)
        order = np.argsort(words, axis=None, kind="stable")
        pictures = ((clip << SHIFT_BITS) - SIGNATURE_RATE * places.repeat(WORDS))[order]
        distinct, begins, counts = np.unique(words.ravel()[order], return_index=True, return_counts=True)
        taken = np.minimum(counts, CROWDED + 1 - self.counts[distinct])
        parts = zip(distinct.tolist(), begins.tolist(), taken.tolist(), strict=True)
        # || gives text, whose bytes are the two values' bytes
        self.database.executemany(
            f"""INSERT INTO {self.table} VALUES (?, ?)
            ON CONFLICT (word) DO UPDATE SET pictures = CAST(pictures || excluded.pictures AS BLOB)""",
            ((word, pictures[begin : begin + count].tobytes()) for word, begin, count in parts if count),
        )
        self.counts[distinct] += taken

    def find_shared(self, places: Int64[np.ndarray, " P"], words: Int64[np.ndarray, "P W"], crowded: Bool[np.ndarray, " N"]) -> Found:
        """Return the clips, and how many pictures later they begin, that share most words; the first found first among equals.

        `crowded` says which of the words, picture after picture, are not looked up.
        """
        wanted = words.ravel()
        slots = np.flatnonzero((self.counts[wanted] > 0) & ~crowded)
        if len(slots) < LEAST_SHARED:
            return np.empty(0, FOUND)
        ask = f"SELECT word, pictures FROM {self.table} WHERE word IN (SELECT value FROM json_each(?))"
        stored = self.database.execute(ask, (json.dumps(np.unique(wanted[slots]).tolist()),))
        pictures = {word: np.frombuffer(blob, np.int64) for word, blob in stored}
        looked_up = zip(wanted[slots].tolist(), places.repeat(WORDS)[slots].tolist(), strict=True)
        met = [pictures[word] + place for word, place in looked_up]
        keys, firsts, shared = np.unique(np.concatenate(met), return_index=True, return_counts=True)
        enough = np.flatnonzero(shared >= LEAST_SHARED)
        most = enough[np.lexsort((firsts[enough], -shared[enough]))][:COMPARED]
        found = np.zeros(len(most), FOUND)
        found["clip"] = (keys[most] + (1 << (SHIFT_BITS - 1))) >> SHIFT_BITS
        found["shift"] = keys[most] - (found["clip"] << SHIFT_BITS)
        found["shared"], found["slot"] = shared[most], slots.repeat([len(one) for one in met])[firsts[most]]
        found["distance"] = np.nan
        return found


@dataclass
class DuplicateIndex:
    """Signatures of the accepted clips and the words of their pictures, in a database; in memory is only what a search finds: 8 bytes for
    each picture that shares a word.

    `kept` names the file in which searches are kept from one run to the next; None keeps none.
    """

    database: sqlite3.Connection = field(default_factory=open_scratch)
    kept: Path | None = None

    def __post_init__(self) -> None:
        self.database.execute("CREATE TABLE clips (number INTEGER PRIMARY KEY, name TEXT, signature BLOB)")  # at whole seconds
        self.words, self.new_words = WordIndex(self.database, "words"), WordIndex(self.database, "new_words")
        self.earlier = EarlierSearches(self.database, self.kept)
        self.full_searches = 0  # that looked up all accepted clips, and not new ones alone

    def add(self, name: str, signature: Signature) -> None:
        """Accept the clip that was searched for last."""
        number, seconds = self.earlier.number, signature[::SIGNATURE_RATE]
        self.database.execute("INSERT INTO clips VALUES (?, ?, ?)", (number, name, seconds.tobytes()))
        self.words.add(number, seconds)
        if not self.earlier.accept() and self.earlier.any:
            self.new_words.add(number, seconds)

    def find_closest(self, signature: Signature) -> Likeness | None:
        """Return the accepted clip that a clip resembles most, at the best distance in time; None if none resembles it at all."""
        pictures = [(signature, *list_words(signature)), (signature[:, :, ::-1], *list_words(signature[:, :, ::-1]))]
        crowded = [self.words.counts[words.ravel()] > CROWDED for _, _, words in pictures]
        found = self.earlier.recall(signature, np.packbits(np.concatenate(crowded)).tobytes(), full=COMPARED)
        self.full_searches += found is None
        best: Likeness | None = None
        lists = []
        for mirrored, (mine, places, words) in enumerate(pictures):
            if found is None:
                most = self.words.find_shared(places, words, crowded[mirrored])
            else:
                most = np.concatenate([found[mirrored], self.new_words.find_shared(places, words, crowded[mirrored])])
                # In a list of pictures clips stand in their order, and a clip's later pictures behind: those with a smaller shift.
                most = most[np.lexsort((-most["shift"], most["clip"], most["slot"], -most["shared"]))][:COMPARED]
            for one in most:
                if one["seconds"] == 0:  # not compared yet
                    one["distance"], one["seconds"] = self._compare(int(one["clip"]), mine, int(one["shift"]))
                if best is None or one["distance"] < best.distance:
                    best = self._describe(one, bool(mirrored)) or best
            lists.append(most)
        self.earlier.record(*lists)
        return best

    def _compare(self, clip: int, mine: Signature, shift: int) -> tuple[float, float]:
        """Return distance and seconds in common with a clip that begins `shift` pictures later; no number if that is too little."""
        [stored] = self.database.execute("SELECT signature FROM clips WHERE number = ?", (clip,)).fetchone()
        theirs = np.frombuffer(stored, np.uint8).reshape(-1, *mine.shape[1:])
        places = np.arange(len(theirs)) * SIGNATURE_RATE + shift
        both = (places >= 0) & (places < len(mine))
        shorter = min(len(theirs), len(mine) / SIGNATURE_RATE)
        if both.sum() < max(1, LEAST_OVERLAP * shorter):
            return math.nan, math.nan
        away = np.abs(theirs[both].astype(np.int16) - mine[places[both]])
        return float(away.mean(dtype=np.float64)), float(both.sum())

    def _describe(self, one: np.void, mirrored: bool) -> Likeness | None:
        """Return a comparison as a Likeness; None if there was too little to compare."""
        if math.isnan(one["distance"]):
            return None
        [name] = self.database.execute("SELECT name FROM clips WHERE number = ?", (int(one["clip"]),)).fetchone()
        return Likeness(name, float(one["distance"]), mirrored, float(one["seconds"]))


def list_words(signature: Signature) -> tuple[Int64[np.ndarray, " P"], Int64[np.ndarray, "P W"]]:
    """Return the places of the pictures that are not flat, and their words: 16 bits each, above them the word's place in the picture."""
    grey = signature.reshape(len(signature), -1, 3).mean(2)
    bits = np.packbits(grey > np.median(grey, axis=1, keepdims=True), axis=1)
    words = bits.reshape(len(grey), WORDS, -1).astype(np.int64)
    values = words[..., 0] * 256 + words[..., 1] + (np.arange(WORDS) << WORD_BITS)
    places = np.flatnonzero(grey.std(axis=1) >= FLAT)
    return places, values[places]
