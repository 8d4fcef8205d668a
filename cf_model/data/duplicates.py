"""Copies among clips: whole or a part, mirrored or not, of another quality, size or frame rate.

A clip's signature is a picture of 8 x 8 blocks every quarter of a second. Of the clips accepted before, the picture of each whole second is
looked up by four 16-bit words: whether each block is brighter than the picture's median. Clips that share words at the same distance in
time are compared block by block. So a collection is searched in time that grows with its copies, and not with its square.
"""

from __future__ import annotations

import sqlite3
from array import array
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int64, UInt8, UInt16

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
    """Signatures of the accepted clips and the words of their pictures, in a database. In memory are 2 bytes for each possible word,
    half a MiB however many clips there are, and during a search 8 bytes for each picture that shares a word.
    """

    database: sqlite3.Connection = field(default_factory=open_scratch)
    pictures: UInt16[np.ndarray, " W"] = field(default_factory=lambda: np.zeros(WORDS << 16, np.uint16))  # of each word, to CROWDED + 1

    def __post_init__(self) -> None:
        self.database.execute("CREATE TABLE clips (number INTEGER PRIMARY KEY, name TEXT, signature BLOB)")  # at whole seconds
        self.database.execute("CREATE TABLE words (word, clip, second, PRIMARY KEY (word, clip, second)) WITHOUT ROWID")

    def add(self, name: str, signature: Signature) -> None:
        """Add an accepted clip."""
        seconds = signature[::SIGNATURE_RATE]
        clip = self.database.execute("INSERT INTO clips (name, signature) VALUES (?, ?)", (name, seconds.tobytes())).lastrowid
        places, words = list_words(seconds)
        for second, word in zip(places.repeat(WORDS).tolist(), words.ravel().tolist(), strict=True):
            if self.pictures[word] <= CROWDED:
                self.pictures[word] += 1
                self.database.execute("INSERT INTO words VALUES (?, ?, ?)", (word, clip, second))

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
        found = array("q")
        places, words = list_words(mine)
        telling = (self.pictures[words] > 0) & (self.pictures[words] <= CROWDED)
        look_up = "SELECT clip, second FROM words WHERE word = ? ORDER BY clip, second"
        for place, word in zip(np.repeat(places, telling.sum(1)).tolist(), words[telling].tolist(), strict=True):
            pictures = self.database.execute(look_up, (word,))
            found.extend((clip << SHIFT_BITS) + place - SIGNATURE_RATE * second for clip, second in pictures)
        keys, firsts, shared = np.unique(np.array(found, np.int64), return_index=True, return_counts=True)
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
