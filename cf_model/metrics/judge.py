"""Visual Stability: a judge looks at a video and rates its exposure from 0 to 5 (Self-Forcing++, sec. 3.4 and appendix A.8).

The paper's judge is Gemini-2.5-Pro, which sees the whole video; its scale is 20 x the mean rating, since 22 of its 24 printed
values are 20 k / 128 for 128 videos. A judge is anything that answers the rubric with text; four are in cf_model/metrics/judges.py.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import UInt8

Video = UInt8[np.ndarray, "V Y X 3"]
# Self-Forcing++, appendix A.8, word for word; {prompt} stands where the paper's text leaves the video's prompt out.
RUBRIC = """You are tasked with rating the exposure stability of a video. Assign a score according to the following scale:

0: Catastrophic Exposure. Nearly the entire frame is either blown out (pure white) or crushed (pure black), rendering the scene unreadable.
1: Severe Exposure Failure. Large portions of the frame are dominated by over-exposure or under-exposure, substantially impairing \
visibility.
2: Noticeable Exposure Problems. Persistent clipping is present in highlights or shadows. Significant areas lose detail, though the \
frame remains viewable.
3: Moderate Exposure Issues. Over-exposed highlights or under-exposed shadows occur but are limited in extent or duration.
4: Minor Exposure Flaws. Small regions are occasionally too bright or too dark, but these do not meaningfully disrupt overall visibility.
5: Well-Exposed. Balanced lighting across the frame. No distracting over-exposure or darkening; both highlights and shadows retain detail.

Do not claim that the observations in any video are of a specific artistic style or scene transitions unless the prompt explicitly \
states so. The prompt for generating the video is as follows: {prompt}

First, provide a brief explanation of your reasoning, describing the observed exposure characteristics. Then, state your final score \
according to the scale."""
RUBRIC_HASH = hashlib.sha256(RUBRIC.encode()).hexdigest()[:12]
SCALE = 20  # points of Visual Stability for a point of rating
BEST = 5
# "score" or "rating", at most a few words that hold no digit, and the number; "4/5" and "4 out of 5" are a 4
STATED = re.compile(r"(?:score|rating)[^0-9\n]{0,30}?(\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*(\d+))?", re.IGNORECASE)
ALONE = re.compile(r"^\W*(\d+(?:\.\d+)?)\W*$")


class Judge(Protocol):
    """A judge of videos."""

    name: str  # what answers, such as a model's id with its version; it stands in the scores

    def answer(self, video: Video, fps: float, question: str, *, key: str) -> str:
        """Answer a question about a video in text; `key` names the video. Raises ValueError where no answer comes."""


@dataclass(frozen=True)
class Rating:
    """An answer of a judge; `score` is None, and `failure` a sentence, where the answer held no rating."""

    score: int | None
    text: str
    judge: str
    rubric: str = RUBRIC_HASH
    failure: str = ""


def read_rating(text: str) -> int:
    """Read the rating out of a judge's answer: the last number after "score" or "rating", or a last line that is a number alone.

    Raises ValueError for an answer without a whole number from 0 to 5 there.
    """
    stated = [(number, scale) for number, scale in STATED.findall(text) if scale in ("", str(BEST))]
    lines = [line for line in text.splitlines() if line.strip()]
    if not stated and lines and (alone := ALONE.match(lines[-1])):
        stated = [(alone[1], "")]
    number = float(stated[-1][0]) if stated else -1.0
    if number != int(number) or not 0 <= number <= BEST:
        raise ValueError(
            f"the judge's answer holds no score from 0 to {BEST}: {' '.join(text.split())[:120]!r}; ask it again, or another judge"
        )
    return int(number)


def count_ratings(answers: Sequence[str]) -> tuple[list[int], int]:
    """Return how often each rating from 0 to 5 was given, and how many answers held none."""
    given: Counter[int | None] = Counter()
    for text in answers:
        try:
            given[read_rating(text)] += 1
        except ValueError:
            given[None] += 1
    return [given[score] for score in range(BEST + 1)], given[None]


def rate_video(judge: Judge, video: Video, fps: float, prompt: str, *, key: str, repeats: int = 1) -> list[Rating]:
    """Ask a judge `repeats` times; an answer that is no rating, and a judge that does not answer, are recorded with their reason."""
    out = []
    for _ in range(repeats):
        text = ""
        try:
            text = judge.answer(video, fps, RUBRIC.format(prompt=prompt), key=key)
            out.append(Rating(read_rating(text), text, judge.name))
        except ValueError as error:
            out.append(Rating(None, text, judge.name, failure=str(error)))
    return out


def score_stability(ratings: Sequence[Rating]) -> float:
    """Return Visual Stability, 0 to 100: 20 x the mean rating. Raises ValueError if a rating failed, or there is none."""
    failed = [rating.failure for rating in ratings if rating.score is None]
    if not ratings:
        raise ValueError("no video was rated, so there is no mean rating; rate at least one")
    if failed:
        raise ValueError(f"{len(failed)} of {len(ratings)} ratings failed; the first: {failed[0]}")
    return SCALE * float(np.mean([rating.score for rating in ratings if rating.score is not None]))


def measure_agreement(ratings: Sequence[Rating]) -> float:
    """Return the share of a video's ratings that are the most common one; failed ones agree with nothing."""
    given = Counter(rating.score for rating in ratings if rating.score is not None)
    return max(given.values(), default=0) / len(ratings) if ratings else 0.0
