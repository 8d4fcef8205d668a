"""Which videos an evaluation needs: prompts from the files that their repositories publish, subsets of them, and what it all costs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from cf_model.data.prompts import iterate_prompts
from cf_model.evaluate.published import find_published

from .system_facts import SYSTEMS

Subset = Literal["smoke", "nightly", "paper", "all"]
SUBSETS: Mapping[Subset, tuple[int | None, int]] = {  # prompts and seeds; None: all prompts
    "smoke": (2, 1),
    "nightly": (16, 1),
    "paper": (100, 5),
    "all": (None, 5),
}


@dataclass(frozen=True)
class PromptSet:
    """Prompts by id. `texts` are what systems are given, where that is longer than the prompt itself."""

    prompts: Mapping[str, str]
    texts: Mapping[str, str]
    whole: bool  # the subset `paper` is all of them, as for VBench


class VideoTask(NamedTuple):
    """A video to make."""

    prompt_id: str
    prompt: str
    text: str
    seed: int

    @property
    def file(self) -> str:
        """Its file's name, by id, because prompts may be longer than names."""
        return f"{self.prompt_id}-s{self.seed}.mp4"


def read_prompts(file: Path, extended: Path | None) -> PromptSet:
    """Read prompts: VBench_full_info.json by `prompt_en` (946 entries, ids by number), a JSON object {id: text}, or one a line, as
    MovieGenVideoBench.txt has them (ids by line). `extended` holds the same prompts in the same order, written out.

    ValueError for a file of another form or another number of prompts.
    """
    if file.suffix != ".json":
        prompts, whole = {f"{number:05d}": text for number, text in iterate_prompts(file)}, False
    else:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            texts = found if isinstance(found, dict) else {f"{number:05d}": row["prompt_en"] for number, row in enumerate(found, 1)}
        except (ValueError, TypeError, LookupError):
            raise ValueError(f"{file} is neither VBench's list of prompts nor an object of prompts by id; name such a file") from None
        prompts, whole = texts, not isinstance(found, dict)
    if bad := [key for key, text in prompts.items() if not (isinstance(text, str) and text.strip()) or "/" in key or key.startswith(".")]:
        raise ValueError(f"{file}: the prompt {bad[0]!r} is no text, or its id can't be a file's name; correct it")
    if not prompts:
        raise ValueError(f"{file} holds no prompt; name another file")
    if extended is None:
        return PromptSet(prompts, prompts, whole)
    longer = [text for _, text in iterate_prompts(extended)]
    if len(longer) != len(prompts):
        raise ValueError(f"{extended} holds {len(longer)} prompts and {file} {len(prompts)}; they must be the same in the same order")
    return PromptSet(prompts, dict(zip(prompts, longer, strict=True)), whole)


def list_tasks(prompts: PromptSet, subset: Subset) -> list[VideoTask]:
    """List the videos of a subset. Choice: Context Forcing does not say which 100 prompts it drew; ours are the first of an order that
    is drawn once, from the seed 0, so that smaller subsets are parts of larger ones. Of VBench's list `paper` is all of it.
    """
    count, seeds = SUBSETS[subset]
    ids = list(prompts.prompts)
    if count is not None and not (subset == "paper" and prompts.whole):
        drawn = np.random.default_rng(0).permutation(len(ids))[:count]
        ids = [ids[number] for number in sorted(drawn)]
    return [VideoTask(key, prompts.prompts[key], prompts.texts[key], seed) for key in ids for seed in range(seeds)]


def find_rate(system: str) -> float | None:
    """Return a system's printed throughput in frames a second (Context Forcing, Table 2), or None."""
    facts = SYSTEMS.get(system)
    printed = find_published("context-forcing", "2", None).get(facts.printed or "") if facts else None
    return printed["frames_a_second"] if printed else None


def describe_cost(tasks: Sequence[VideoTask], frames: int, rate: float | None, source: str) -> str:
    """Return the expected cost in a sentence: videos, frames and GPU hours, from a rate in frames a second that `source` states."""
    total = len(tasks) * frames
    prompts = len({task.prompt_id for task in tasks})
    hours = (
        f"{total / rate / 3600:.2f} GPU hours at {rate:g} frames a second ({source})" if rate else "hours not known before the first video"
    )
    return f"{len(tasks)} videos of {prompts} prompts, {frames} frames each, {total} in all: {hours}"


def refuse_request(
    system: str, weights: Path, tasks: Sequence[VideoTask], seconds: float, rate: float | None, first_frames: Path | None
) -> None:
    """Raise ValueError for what can be refused before weights are read. `first_frames` holds PROMPT_ID.png for systems that need them."""
    facts, ids = SYSTEMS.get(system), {task.prompt_id for task in tasks}
    if seconds <= 0 or (rate is not None and rate <= 0):
        raise ValueError(f"--seconds is {seconds:g} and --rate {rate}; both are above 0")
    if facts and facts.longest and seconds > facts.longest:
        raise ValueError(f"--seconds is {seconds:g}, and {system} is made for {facts.longest:g} s at most; ask for shorter videos")
    if not weights.is_dir():
        raise ValueError(f"--weights {weights} is no folder; name one that holds {facts.weights if facts else 'a model of this project'}")
    needs = bool(facts and facts.pipeline == "HunyuanVideoFramepackPipeline")
    if needs and not first_frames:
        raise ValueError(f"{system} begins from a picture; name a folder of PROMPT_ID.png by --first-frames")
    if first_frames and not needs:
        raise ValueError(f"--first-frames is for systems that begin from a picture, and {system} does not; leave it out")
    if first_frames and (absent := sorted(key for key in ids if not (first_frames / f"{key}.png").is_file())):
        raise ValueError(f"{first_frames} has no {absent[0]}.png; {len(absent)} of {len(ids)} prompts lack their first frame")


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Return KEY=VALUE settings with values read as JSON, or as text where they are none."""
    out: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting} has no =; write KEY=VALUE, such as num_inference_steps=20")
        try:
            out[key] = json.loads(value)
        except ValueError:
            out[key] = value
    return out
