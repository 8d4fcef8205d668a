# Long: every rule between sections is here.
"""params.yaml as types. Every value that changes a result is stated there: nothing here has a default."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from cf_model.codec.linear import CodecSpec, latent_frames
from cf_model.data.video import UNREADABLE_WIDTHS
from cf_model.model.denoiser import Compute, ModelSpec
from cf_model.model.flow import Flow
from cf_model.model.memory import MemorySpec
from cf_model.model.view import Passes, TeacherView
from cf_model.train.base import BaseSpec
from cf_model.train.causal_init import CausalInitSpec
from cf_model.train.layout import Layout
from cf_model.train.student import StudentSpec
from cf_model.train.teacher import TeacherSpec
from cf_model.train.trainer.engine import EngineSpec
from cf_model.train.trainer.samples import SamplesSpec

from . import yaml_file
from .nightly import Nightly, Section, Start, starts_are_what_is_used
from .rules import samples_fit

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class Video(Section):
    """The size every clip is brought to, and every video is generated at."""

    height: PositiveInt
    width: PositiveInt
    fps: PositiveInt


class Tracking(Section):
    wandb: Literal["off", "offline", "online"]
    project: str


class Clips(Section):
    source: Literal["worlds", "folder"]
    folder: Path | None  # of videos, when source is folder; FILE.txt beside FILE.mp4 is its caption
    count: Count  # good clips
    bad: Count  # clips of each bad kind, planted among them
    frames: PositiveInt
    crf: Annotated[int, Field(ge=0, le=51)]

    @model_validator(mode="after")
    def consistent(self) -> Self:
        if self.source == "folder" and self.folder is None:
            raise ValueError("folder is null, but source is folder; name a folder of videos, or set source to worlds")
        if self.source == "worlds" and not self.count:
            raise ValueError("count is 0; render at least one good clip, or set source to folder")
        return self


class Filter(Section):
    """Thresholds of cf_model/data/filter.py; a manifest states them with each rejection."""

    min_seconds: PositiveFloat  # a clip must be longer
    min_fps: PositiveFloat
    max_clipped: Share  # share of pixels at black or white
    min_motion: Annotated[float, Field(ge=0)]  # mean absolute difference of pictures a second apart, 0..255, median over the clip
    max_cut: PositiveFloat  # largest lasting difference of neighbouring frames over what is usual around it
    min_distance: Annotated[float, Field(ge=0)]  # mean absolute difference to any clip kept before, 0..255
    heldout: Count  # kept clips that no training stage sees: prompts and prefixes of the evaluation
    workers: PositiveInt  # processes that read files
    timeout: PositiveFloat  # seconds that one file may take to be read


class CodecParams(Section):
    kind: Literal["linear", "wan"]
    weights: str | None  # of Wan's: a folder in the diffusers layout, or its name on the Hugging Face Hub
    clips: PositiveInt  # that the linear codec is fitted on
    linear: CodecSpec


class Text(Section):
    kind: Literal["words", "umt5"]
    weights: str | None  # of UMT5, as for the codec
    tokens: PositiveInt
    channels: PositiveInt
    negative: str  # the null prompt of guidance: what generation moves away from


class Encode(Section):
    shard: PositiveInt  # clips in a file
    dtype: Literal["float32", "float16", "bfloat16"]


CAUSAL = ("causal_init", "stage1", "stage2")


class System(Section):
    """One row of the comparison: weights, and what they see of the past: what they were trained with, or something else."""

    weights: Literal["base", "teacher", "causal_init", "stage1", "stage2"]
    memory: MemorySpec | None  # of a causal model; null: its own
    view: TeacherView | None  # of a bidirectional one; null: its own
    frames: PositiveInt  # latent frames of its videos, a real prefix included

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        kind, other = ("memory", "view") if self.weights in CAUSAL else ("view", "memory")
        if getattr(self, other) is not None:
            raise ValueError(f"weights is {self.weights}, which is run with a {kind}; set {other} to null")
        return self


class Generate(Section):
    prompts: PositiveInt
    continued: PositiveInt  # held-out clips whose beginnings are continued
    prompts_file: Path | None  # one prompt a line; None: captions of the held-out clips
    seeds: list[int]
    frames: PositiveInt  # latent frames of the real clips beside them
    prefix: PositiveInt  # latent frames of a real clip that a continuation starts from
    sampler_steps: PositiveInt  # of the bidirectional models
    guidance: Annotated[float, Field(ge=1)]
    guidance_passes: Passes
    crf: Annotated[int, Field(ge=0, le=51)]
    systems: dict[str, System]  # text to video
    continuations: dict[str, System]  # of a real prefix


class Evaluate(Section):
    gap: PositiveFloat  # seconds out of sight before a return counts in map_error
    absence: PositiveFloat  # and in memory_ratio
    resamples: PositiveInt  # of the bootstrap
    choices: Annotated[int, Field(ge=2)]  # captions in the blind guess


class Params(Section):
    profile: str
    seed: Count
    threads: PositiveInt
    compute: Compute
    video: Video
    tracking: Tracking
    engine: EngineSpec
    start: Start
    clips: Clips
    filter: Filter
    codec: CodecParams
    text: Text
    encode: Encode
    model: ModelSpec
    flow: Flow
    base: BaseSpec
    teacher: TeacherSpec
    causal_init: CausalInitSpec
    stage1: StudentSpec
    stage2: StudentSpec
    samples: SamplesSpec
    generate: Generate
    evaluate: Evaluate
    nightly: Nightly

    @model_validator(mode="after")
    def sections_agree(self) -> Self:
        """What one section alone can't know; said before anything expensive runs."""
        rules = (weights_are_named, pictures_fit, clips_are_long_enough, the_base_model_can_make_them, students_are_shown_what_exists)
        for rule in (*rules, systems_can_run, the_engine_can_train_it, starts_are_what_is_used, samples_fit):
            rule(self)
        return self


def weights_are_named(p: Params) -> None:
    kinds = {"codec": (p.codec.kind, "wan"), "text": (p.text.kind, "umt5"), "base": (p.base.init, "wan")}
    for name, (kind, real) in kinds.items():
        section, word = getattr(p, name), "init" if name == "base" else "kind"
        if kind == real and section.weights is None:
            raise ValueError(f"{name}.weights is null, but {name}.{word} is {real}; name a folder, or a name on the Hugging Face Hub")
        if kind != real and section.weights is not None:
            raise ValueError(f"{name}.weights is {section.weights}, but {name}.{word} is {kind}, which has no weights to read; use null")


def pictures_fit(p: Params) -> None:
    grid = 32 if p.clips.source == "worlds" else 16  # a world's unit is 1/32 of its height; a token is 16 pixels
    for name, value, step in (("height", p.video.height, grid), ("width", p.video.width, 16)):
        if value % step:
            raise ValueError(f"video.{name} is {value}, not a multiple of {step}; use {value // step * step + step}")
    if p.video.width in UNREADABLE_WIDTHS:
        raise ValueError(f"video.width is {p.video.width}, which decord can't read; use 32 or 64")


def clips_are_long_enough(p: Params) -> None:
    if p.clips.source == "worlds":
        there = latent_frames(p.clips.frames)
        needed = {"base.window": p.base.window, "generate.prefix": p.generate.prefix}
        needed |= {"teacher.longest + teacher.target": p.teacher.longest + p.teacher.target}
        needed |= {"causal_init.longest + causal_init.frames": p.causal_init.longest + p.causal_init.frames}
        for name, frames in needed.items():
            if frames > there:
                raise ValueError(f"{name} is {frames} latent frames, but clips.frames is {p.clips.frames}, so {there}; use longer clips")
        if p.clips.count <= p.filter.heldout:
            raise ValueError(f"filter.heldout is {p.filter.heldout} of clips.count {p.clips.count}; leave some to train on")
    for name, count in (("prompts", p.generate.prompts), ("continued", p.generate.continued)):
        if count > p.filter.heldout and (name == "continued" or p.generate.prompts_file is None):
            raise ValueError(f"generate.{name} is {count}, but only filter.heldout {p.filter.heldout} clips are held out; use at most that")


def the_base_model_can_make_them(p: Params) -> None:
    if p.causal_init.method == "ode" and p.causal_init.frames > p.base.window:
        stated = f"causal_init.frames is {p.causal_init.frames}, but base.window is {p.base.window}"
        raise ValueError(f"{stated}, and by method ode the base model makes those frames; use at most that, or method: teacher_forcing")


def students_are_shown_what_exists(p: Params) -> None:
    context, window = p.stage2.teacher.context, p.stage2.rollout.window
    shown = Layout(replace(p.teacher.view, context=context), window, p.stage2.horizon.longest - window)
    Layout(p.teacher.view, p.teacher.target, p.teacher.longest).check(shown, accept=p.stage2.teacher.mismatch == "accept")
    if p.stage1.teacher.context != "none":
        raise ValueError(f"stage1.teacher.context is {p.stage1.teacher.context}, but the base model knows no context; use none")
    chunk = p.stage2.rollout.chunk
    for name, other in (("causal_init", p.causal_init.chunk), ("stage1.rollout", p.stage1.rollout.chunk)):
        if other != chunk:
            raise ValueError(f"{name}.chunk is {other}, but stage2.rollout.chunk is {chunk}; use the same")
    if p.generate.prefix % chunk:
        whole = p.generate.prefix // chunk * chunk
        raise ValueError(f"generate.prefix is {p.generate.prefix}, not whole chunks of {chunk} latent frames; use {whole or chunk}")
    lengths = {"frames": p.generate.frames} | {f"continuations.{n}.frames": s.frames for n, s in p.generate.continuations.items()}
    for name, frames in lengths.items():
        if frames <= p.generate.prefix:
            raise ValueError(f"generate.{name} is {frames}, no more than generate.prefix {p.generate.prefix}; use more")


def the_engine_can_train_it(p: Params) -> None:
    if p.engine.zero == 3 and p.teacher.view.context_pass == "own" and not p.compute.checkpointing:
        stated = "engine.zero is 3 and teacher.view.context_pass own, whose gradient ZeRO 3 can't take"
        raise ValueError(f"{stated}; use compute.checkpointing: true, engine.zero: 2, or context_pass: joint")


def systems_can_run(p: Params) -> None:
    for name, system in [*p.generate.systems.items(), *p.generate.continuations.items()]:
        if not re.fullmatch(r"[a-z0-9_]+", name) or name == "real":
            raise ValueError(f"generate names a system {name!r}; use small letters, digits and _, and not real: it names a folder")
        if system.memory:
            system.memory.hold(p.stage2.rollout.chunk)
        read, trained = system.view and system.view.context != "none" and system.view.context_pass, p.teacher.view.context_pass
        if read and read != trained:
            raise ValueError(f"generate's {name} has view.context_pass {read}, but teacher.view.context_pass is {trained}; use the same")


def load(path: Path = Path("params.yaml")) -> Params:
    stated = yaml_file.read(path)
    try:
        return Params.model_validate(stated)
    except ValidationError as error:
        raise yaml_file.Refused(yaml_file.explain(error, Params, path)) from None
