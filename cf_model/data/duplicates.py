"""Copies among clips: whole or a part, mirrored or not, of another quality, size or frame rate.

A clip's signature is a picture of 8 x 8 blocks every quarter of a second. Of the clips accepted before, the picture of each whole second is
looked up by four 16-bit words: whether each block is brighter than the picture's median. Clips that share words at the same distance in
time are compared block by block. So a collection is searched in time that grows with its copies, and not with its square.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int64, UInt8

from .measures import SIGNATURE_RATE
from .scratch import open_scratch

WORDS = 4  # of 16 bits, that a picture is looked up by
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


@dataclass
class DuplicateIndex:
    """Signatures of the accepted clips and the words of their pictures, in a database; in memory is only what a search finds: 8 bytes for
    each picture that shares a word.
    """

    database: sqlite3.Connection = field(default_factory=open_scratch)

    def __post_init__(self) -> None:
        self.database.execute("CREATE TABLE clips (number INTEGER PRIMARY KEY, name TEXT, signature BLOB)")  # at whole seconds
        # a word's pictures, 8 bytes each, up to CROWDED + 1: the clip's number above SHIFT_BITS, minus where it stands in the clip
        self.database.execute("CREATE TABLE words (word INTEGER PRIMARY KEY, pictures BLOB)")

    def add(self, name: str, signature: Signature) -> None:
        """Add an accepted clip."""
        seconds = signature[::SIGNATURE_RATE]
        self.database.execute("INSERT INTO clips (name, signature) VALUES (?, ?)", (name, seconds.tobytes()))
        ((clip,),) = self.database.execute("SELECT last_insert_rowid()")
        places, words = list_words(seconds)
        for word in np.unique(words).tolist():
            pictures = (clip << SHIFT_BITS) - SIGNATURE_RATE * places[(words == word).any(axis=1)]
            if (room := CROWDED + 1 - len(before := self._read_pictures(word))) > 0:
                stored = np.concatenate([before, pictures[:room]]).tobytes()
                self.database.execute("INSERT OR REPLACE INTO words VALUES (?, ?)", (word, stored))

    def _read_pictures(self, word: int) -> Int64[np.ndarray, " N"]:
        """Read the pictures of a word, clip after clip."""
        row = self.database.execute("SELECT pictures FROM words WHERE word = ?", (word,)).fetchone()
        return np.frombuffer(row[0] if row else b"", np.int64)

    def find_closest(self, signature: Signature) -> Likeness | None:
        """Return the accepted clip that a clip resembles most, at the best distance in time; None if none resembles it at all."""
        best: Likeness | None = None
        for mirrored, mine in ((False, signature), (True, signature[:, :, ::-1])):
            for clip, shift in self._find_shared(mine):
                if likeness := self._compare(clip, mine, shift, mirrored):
                    best = likeness if best is None or likeness.distance < best.distance else best
        return best

    def _find_shared(self, mine: Signature) -> list[tuple[int, int]]:
        """Return (clip, how many pictures after `mine` it begins) of those that share most words, the first found first among equals."""
        places, words = list_words(mine)
        found = [np.empty(0, np.int64)]
        for place, word in zip(places.repeat(WORDS).tolist(), words.ravel().tolist(), strict=True):
            if len(pictures := self._read_pictures(word)) <= CROWDED:
                found.append(pictures + place)
        keys, firsts, shared = np.unique(np.concatenate(found), return_index=True, return_counts=True)
        enough = np.flatnonzero(shared >= LEAST_SHARED)
        most = enough[np.lexsort((firsts[enough], -shared[enough]))][:COMPARED]
        half = 1 << (SHIFT_BITS - 1)
        clips = (keys[most] + half) >> SHIFT_BITS
        return list(zip(clips.tolist(), (keys[most] - (clips << SHIFT_BITS)).tolist(), strict=True))

    def _compare(self, clip: int, mine: Signature, shift: int, mirrored: bool) -> Likeness | None:
        """Compare a signature with a clip that begins `shift` pictures after it; None if they have too little in common."""
        name, stored = self.database.execute("SELECT name, signature FROM clips WHERE number = ?", (clip,)).fetchone()
        theirs = np.frombuffer(stored, np.uint8).reshape(-1, *mine.shape[1:])
        seconds = np.arange(len(theirs))
        places = seconds * SIGNATURE_RATE + shift
        both = (places >= 0) & (places < len(mine))
        shorter = min(len(theirs), len(mine) / SIGNATURE_RATE)
        if both.sum() < max(1, LEAST_OVERLAP * shorter):
            return None
        away = np.abs(theirs[both].astype(np.int16) - mine[places[both]])
        return Likeness(name, float(away.mean(dtype=np.float64)), mirrored, float(both.sum()))


def list_words(signature: Signature) -> tuple[Int64[np.ndarray, " P"], Int64[np.ndarray, "P W"]]:
    """Return the places of the pictures that are not flat, and their words: 16 bits each, above them the word's place in the picture."""
    grey = signature.reshape(len(signature), -1, 3).mean(2)
    bits = np.packbits(grey > np.median(grey, axis=1, keepdims=True), axis=1)
    words = bits.reshape(len(grey), WORDS, -1).astype(np.int64)
    values = words[..., 0] * 256 + words[..., 1] + (np.arange(WORDS) << 16)
    places = np.flatnonzero([picture.std() >= FLAT for picture in grey])
    return places, values[places]
