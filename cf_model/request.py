"""Requests to the pipeline: checked before anything runs, and turned into chunks of latent frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np

from cf_model.codec.interface import TIME, latent_frames, video_frames
from cf_model.text.encoder import TextEncoder

from .folder import Recipe

Switch = Literal["recache", "flush", "keep"]
Prompts = str | Sequence[tuple[float, str]]


@dataclass(frozen=True)
class RequestPlan:
    """A request in chunks."""

    frames: int  # of new video
    chunks: int  # of new latent frames
    prompts: dict[int, str]  # number of the new chunk from which on a prompt is in force -> prompt
    real: int  # frames at the end of the clip that is continued


def plan_request(
    recipe: Recipe, text: TextEncoder, positions: int, prompt: Prompts, seconds: float, seed: int, switch: str, clip: np.ndarray | None
) -> RequestPlan:
    """Plan a request; raises ValueError for any value that is out of range. `positions` is the length of the RoPE table."""
    if not (math.isfinite(seconds) and seconds > 0 and round(seconds * recipe.fps)):
        raise ValueError(f"seconds is {seconds:g}, which is no length of a video; use {1 / recipe.fps:g} (one frame) or more")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; use a whole number from 0 to 2^63 - 1")
    if switch not in get_args(Switch):
        raise ValueError(f"switch is {switch!r}; use {', '.join(get_args(Switch))}")
    timed = [(0.0, prompt)] if isinstance(prompt, str) else [(float(at), words) for at, words in prompt]
    for _, words in timed:
        check_prompt(words, text)
    real, frames = usable_frames(recipe, clip), round(seconds * recipe.fps)
    # rounded up to latents and to chunks; a video that begins here has a first latent of one frame
    chunks = -(-(-(-frames // TIME) if real else latent_frames(frames + TIME - 1)) // recipe.chunk)
    total = chunks * recipe.chunk + (latent_frames(real) if real else 0)
    if recipe.memory.positions == "absolute" and total > positions:
        problem = f"memory.positions is absolute, whose table ends at latent frame {positions}, and {seconds:g} s of video need {total}"
        raise ValueError(f"{problem}; use at most {video_frames(positions) // recipe.fps} s in all, or bounded positions (anchored)")
    lead = 0 if real else TIME - 1  # the first latent frame of a video is one frame, not four
    starts = [max(0, chunk * recipe.chunk * TIME - lead) / recipe.fps for chunk in range(chunks)]
    return RequestPlan(frames, chunks, place_prompts(timed, starts, seconds), real)


def place_prompts(timed: list[tuple[float, str]], starts: list[float], seconds: float) -> dict[int, str]:
    """Return the number of the first chunk that begins at each prompt's time or later -> prompt."""
    if not timed or timed[0][0] != 0:
        raise ValueError(f"the first prompt's time is {f'{timed[0][0]:g} s' if timed else 'missing'}; the video begins with it, so give 0")
    for (earlier, _), (later, _) in pairwise(timed):
        if not later > earlier:
            raise ValueError(f"the prompts' times {earlier:g} and {later:g} s do not rise; put them in order")
    prompts = {}
    for at, words in timed:
        if not at <= starts[-1] + 1e-9:
            last = f"the last chunk of {seconds:g} s begins at {starts[-1]:g} s"
            raise ValueError(f"a prompt's time is {at:g} s, but {last}; use that or less")
        prompts[next(chunk for chunk, start in enumerate(starts) if start >= at - 1e-9)] = words
    if len(prompts) < len(timed):
        step = starts[-1] - starts[-2] if len(starts) > 1 else seconds
        raise ValueError(f"two prompts' times lie in one chunk, so one of them would never be seen; put them {step:g} s or more apart")
    return prompts


def check_prompt(words: str, text: TextEncoder) -> None:
    """Raise ValueError for an empty prompt, and for a prompt that the encoder would cut, as it does with training captions."""
    if not words.strip():
        raise ValueError("a prompt is empty; describe the video")
    length = text.length(words)
    if length > text.tokens:
        excerpt = f"{words[:40]}…" if len(words) > 40 else words
        problem = f"the prompt {excerpt!r} has {len(words.split())} words, which are {length} tokens"
        raise ValueError(f"{problem}, but the text encoder reads {text.tokens}; shorten it")


def usable_frames(recipe: Recipe, clip: np.ndarray | None) -> int:
    """Return how many frames at the clip's end are complete chunks, of which the first latent is a single frame."""
    if clip is None:
        return 0
    if clip.dtype != np.uint8 or clip.shape[1:] != (recipe.height, recipe.width, 3):
        wanted = [recipe.height, recipe.width, 3]
        raise ValueError(f"continue_from is {clip.dtype} {list(clip.shape)}, but frames of the model are uint8 {wanted}; resize them")
    chunks = (len(clip) + TIME - 1) // (TIME * recipe.chunk)
    if not chunks:
        raise ValueError(f"continue_from has {len(clip)} frames, but a chunk is {video_frames(recipe.chunk)}; use a longer clip")
    return video_frames(chunks * recipe.chunk)
