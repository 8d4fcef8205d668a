"""Whether the sample videos that params.samples asks for can be made: what its section alone can't know."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .schema import Params


def samples_fit(p: Params) -> None:
    for stage in ("base", "teacher", "causal_init", "stage1", "stage2"):
        spec = getattr(p.samples, stage)
        if spec.every and spec.prompts > p.filter.heldout:
            stated = f"samples.{stage}.prompts is {spec.prompts}, but only filter.heldout {p.filter.heldout} clips are held out"
            raise ValueError(f"{stated}; use at most that")
    if p.samples.base.frames > p.base.window:
        raise ValueError(f"samples.base.frames is {p.samples.base.frames}, but base.window is {p.base.window}; use at most that")
    teacher, most = p.samples.teacher, p.samples.teacher.prefix + p.teacher.target
    if teacher.frames > most:
        stated = f"samples.teacher.frames is {teacher.frames}, of which {teacher.prefix} are real, but teacher.target is {p.teacher.target}"
        raise ValueError(f"{stated}; use at most {most}")
    chunks = {"causal_init": p.causal_init.chunk, "stage1": p.stage1.rollout.chunk, "stage2": p.stage2.rollout.chunk}
    for stage, chunk in chunks.items():
        frames = getattr(p.samples, stage).frames
        if frames % chunk:
            down = frames // chunk * chunk
            rule = f"use {down} or {down + chunk}" if down else f"use {chunk}"
            raise ValueError(f"samples.{stage}.frames is {frames}, not whole chunks of {chunk} latent frames; {rule}")
