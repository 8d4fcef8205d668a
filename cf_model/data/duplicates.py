"""Copies among clips: whole or a part, mirrored or not, of another quality, size or frame rate.

A clip's signature is a picture of 8 x 8 blocks every quarter of a second. Of the clips accepted before, the picture of each whole second is
looked up by four 16-bit words: whether each block is brighter than the picture's median. Clips that share words at the same distance in
time are compared block by block. So a collection is searched in time that grows with its copies, and not with its square.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import UInt8

from .measures import SIGNATURE_RATE

WORDS = 4  # of 16 bits, that a picture is looked up by
LEAST_SHARED = 2  # words that two clips must share at one distance in time before they are compared
COMPARED = 24  # clips, at most, that one is compared with: those that share most words
LEAST_OVERLAP = 0.5  # of the shorter clip, that two clips must have in common
FLAT = 2.0  # grey levels; pictures that differ less in themselves are not looked up, because all of them look alike
CROWDED = 2000  # pictures under one word; a word that more share tells nothing

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
    """Signatures of the accepted clips."""

    clips: dict[str, Signature] = field(default_factory=dict)  # at whole seconds
    places: dict[tuple[int, int], list[tuple[str, int]]] = field(default_factory=lambda: defaultdict(list))  # word -> (clip, second)

    def add(self, name: str, signature: Signature) -> None:
        """Add an accepted clip."""
        self.clips[name] = signature[::SIGNATURE_RATE]
        for second, words in list_words(self.clips[name]):
            for key in words:
                self.places[key].append((name, second))

    def find_closest(self, signature: Signature) -> Likeness | None:
        """Return the accepted clip that a clip resembles most, at the best distance in time; None if none resembles it at all."""
        best: Likeness | None = None
        for mirrored, mine in ((False, signature), (True, signature[:, :, ::-1])):
            votes: Counter[tuple[str, int]] = Counter()
            for place, words in list_words(mine):
                for key in words:
                    if len(found := self.places.get(key, ())) <= CROWDED:
                        votes.update((name, place - SIGNATURE_RATE * second) for name, second in found)
            for (name, shift), shared in votes.most_common(COMPARED):
                if shared >= LEAST_SHARED and (likeness := self._compare(name, mine, shift, mirrored)):
                    best = likeness if best is None or likeness.distance < best.distance else best
        return best

    def _compare(self, name: str, mine: Signature, shift: int, mirrored: bool) -> Likeness | None:
        """Compare a signature with a clip that begins `shift` pictures after it; None if they have too little in common."""
        theirs = self.clips[name]
        seconds = np.arange(len(theirs))
        places = seconds * SIGNATURE_RATE + shift
        both = (places >= 0) & (places < len(mine))
        shorter = min(len(theirs), len(mine) / SIGNATURE_RATE)
        if both.sum() < max(1, LEAST_OVERLAP * shorter):
            return None
        away = np.abs(theirs[both].astype(np.int16) - mine[places[both]])
        return Likeness(name, float(away.mean(dtype=np.float64)), mirrored, float(both.sum()))


def list_words(signature: Signature) -> list[tuple[int, list[tuple[int, int]]]]:
    """Return (place, words) of each picture that is not flat; a word is (its place in the picture, its bits)."""
    grey = signature.reshape(len(signature), -1, 3).mean(2)
    bits = np.packbits(grey > np.median(grey, axis=1, keepdims=True), axis=1)
    words = bits.reshape(len(grey), WORDS, -1).astype(np.int64)
    values = words[..., 0] * 256 + words[..., 1]
    return [(place, [(k, int(value)) for k, value in enumerate(values[place])]) for place in range(len(grey)) if grey[place].std() >= FLAT]
