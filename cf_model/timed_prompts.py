"""Lines of a prompt file that hold several prompts, in the notations of LongLive and of Infinity-RoPE."""

from __future__ import annotations

import json
import re

PART = re.compile(r"(.*\S)\s*\[\s*(\d+(?:\.\d+)?)\s*s\s*\]")  # a prompt and how many seconds it lasts
LENGTH = re.compile(r"\[\s*\d+(?:\.\d+)?\s*s\s*\]$")
TimedPrompts = list[tuple[float, str]]  # second from which on a prompt is in force, and the prompt


def split_timed_prompts(line: str, seconds: float) -> TimedPrompts:
    """Return the prompts of a line with the seconds at which they begin; a plain prompt begins at 0.

    `{"prompts": ["a", "b"]}` is LongLive's: each lasts equally long, `seconds` in all. `a[5s] | b[10s]` is Infinity-RoPE's: a number is
    how long a prompt lasts, and the last prompt lasts to the end of the video, so that its number may be left out. Raises ValueError for
    a line that begins like one of these and is not one.
    """
    if line.startswith("{"):
        return split_json_prompts(line, seconds)
    parts = [part.strip() for part in line.split("|")]
    if not any(LENGTH.search(part) for part in parts):
        return [(0.0, line)]
    timed, start = TimedPrompts(), 0.0
    for number, part in enumerate(parts):
        match = PART.fullmatch(part)
        if match is None and (number < len(parts) - 1 or not part):
            raise ValueError(f"{part!r} says not how long it lasts; write it as in: a red disc[5s] | a blue disc[10s]")
        timed.append((start, match[1] if match else part))
        start += float(match[2]) if match else 0.0
    return timed


def split_json_prompts(line: str, seconds: float) -> TimedPrompts:
    """Return the prompts of a JSON object with the key `prompts`, spread evenly over `seconds`."""
    rule = 'write {"prompts": ["a red disc", "a blue disc"]}'
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"it begins like JSON and is none ({error}); {rule}") from None
    prompts = row.get("prompts")
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"its prompts are {prompts!r}; {rule}")
    return [(seconds * number / len(prompts), prompt) for number, prompt in enumerate(prompts)]
