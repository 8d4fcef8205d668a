"""The sections of params.yaml as types. No field has a default, because every value that changes a result is stated in the file."""

import importlib.util
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from cf_model.codec.linear import CodecSpec
from cf_model.data.clip_reader import Decoder
from cf_model.data.fetch_files import FetchLimits
from cf_model.data.prompts import PromptSpec
from cf_model.data.worlds import WorldSpec
from cf_model.evaluate.trouble import CurveRule
from cf_model.model.denoiser import Compute
from cf_model.model.flow import Flow
from cf_model.model.memory import MemorySpec
from cf_model.model.sizes import ModelSpec
from cf_model.model.view import GuidancePasses, TeacherView
from cf_model.train.base import BaseSpec
from cf_model.train.causal_init import CausalInitSpec
from cf_model.train.student import StudentSpec
from cf_model.train.teacher import TeacherSpec
from cf_model.train.trainer.engine import EngineSpec
from cf_model.train.trainer.samples import SamplesSpec

from .nightly import Nightly, Section, Start

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class Video(Section):
    """The size and rate that every clip is converted to and every video is generated at."""

    height: PositiveInt
    width: PositiveInt
    fps: PositiveInt


class Tracking(Section):
    """Where runs are logged; `cf wandb sync` sends those of mode offline."""

    wandb: Literal["off", "offline", "online"]
    project: str


class Clips(Section):
    """The training clips: rendered from worlds, a folder of videos, those that a table lists, or a collection."""

    source: Literal["worlds", "folder", "table", "sekai", "ultravideo"]
    folder: Path | None  # of videos, unless source is worlds; FILE.txt beside FILE.mp4 is its caption
    table: Path | None  # in the folder: CSV, Parquet or JSON lines, with captions by file; source table takes what it lists, and no more
    fetch: FetchLimits | None  # null: nothing is fetched
    worlds: WorldSpec  # how the camera moves in rendered clips
    count: Count  # good clips; of a collection the first ones that its archives hold, 0: all
    bad: Count  # clips of each bad kind, planted among them
    frames: PositiveInt
    crf: Annotated[int, Field(ge=0, le=51)]

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.source in ("sekai", "ultravideo") and self.fetch is None:
            raise ValueError(f"fetch is null, but source is {self.source}, which is fetched; state max_mib, seconds and revision there")
        if self.source in ("folder", "table") and self.folder is None:
            raise ValueError(f"folder is null, but source is {self.source}; name a folder of videos, or set source to worlds")
        if self.source == "table" and self.table is None:
            raise ValueError("table is null, but source is table; name a table in the folder, or set source to folder")
        if self.table is not None and (self.folder is None or not self.table.is_relative_to(self.folder)):
            raise ValueError(f"table is {self.table}, but folder {self.folder}; put it in the folder, so that DVC sees when it changes")
        if self.source == "worlds" and not self.count:
            raise ValueError("count is 0; render at least one good clip, or set source to folder")
        return self


class Network(Section):
    """A class of an installed module, and its weights; cf_model/data/networks.py says what it must do."""

    code: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]  # package.module:Class
    weights: Path  # file or folder; nothing is downloaded


class ScoringNetwork(Network):
    """A network whose number a clip must reach."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]  # of the rule, in the manifest and the report
    at_least: float  # in the network's own unit


class Filter(Section):
    """Thresholds of cf_model/data/filter.py; a manifest states them with each rejection."""

    min_seconds: PositiveFloat  # a clip must be longer
    min_fps: PositiveFloat
    min_side: PositiveInt  # pixels of the shorter side
    min_share: Share  # of the picture that is left when it covers video.height x video.width
    max_clipped: Share  # share of pixels at black or white
    min_motion: Annotated[float, Field(ge=0)]  # mean absolute difference of pictures a second apart, 0..255, median over the clip
    max_repeats: Share  # share of frames that repeat the one before
    max_shake: PositiveFloat  # mean change of the picture's shift from a frame to the next, in parts of its side
    max_cut: PositiveFloat  # largest lasting difference of neighbouring frames over what is usual around it
    cuts: Literal["reject", "split"]  # a clip with a cut is rejected, or its parts are judged each
    trim: Annotated[float, Field(ge=0)]  # seconds; a cut nearer than this to an end is trimmed away with what is beyond it
    min_sharpness: Annotated[float, Field(ge=0)]  # mean absolute Laplacian of a grey picture, 0..255, median over the clip
    max_border: Share  # share of the picture that is a black border
    max_text: Share  # share of the picture that looks like text and stays in place
    min_words: Count  # of the caption, without what cameras and programs call files
    min_distance: Annotated[float, Field(ge=0)]  # mean absolute difference to a part of any clip before, or its mirror image, 0..255
    networks: list[ScoringNetwork]  # rules by networks, such as an aesthetic score
    captioner: Network | None  # describes clips whose caption has fewer than min_words
    heldout: Count  # accepted clips that no training stage reads; the evaluation takes prompts and prefixes from them
    workers: PositiveInt  # processes that read files
    timeout: PositiveFloat  # seconds that one file may take to be read


class CodecParams(Section):
    """Video frames to latents: a linear codec that is fitted here, or Wan's VAE."""

    kind: Literal["linear", "wan"]
    weights: str | None  # of Wan's VAE: a folder in the diffusers layout, or its name on the Hugging Face Hub
    clips: PositiveInt  # that the linear codec is fitted on
    linear: CodecSpec


class Text(Section):
    """Prompts to embeddings: a table of words, or UMT5."""

    kind: Literal["words", "umt5"]
    weights: str | None  # of UMT5: a folder, or its name on the Hugging Face Hub
    tokens: PositiveInt
    channels: PositiveInt
    negative: str  # the null prompt of guidance: what generation moves away from


class Encode(Section):
    """How latents are stored."""

    shard_mib: PositiveFloat  # MiB of a file of latents or embeddings, at most; one that is larger has a file for itself
    dtype: Literal["float32", "float16", "bfloat16"]
    decoder: Decoder  # that reads a clip first; what decord does not deliver, PyAV does

    @field_validator("decoder")
    @classmethod
    def _check_installed(cls, decoder: Decoder) -> Decoder:
        if decoder == "decord" and importlib.util.find_spec("decord") is None:
            raise ValueError("decord is not installed; pip install decord==0.6.0, or write pyav")
        return decoder


CAUSAL = ("causal_init", "stage1", "stage2")


class System(Section):
    """A row of the comparison: weights, and the memory or view of the past that they generate with."""

    weights: Literal["base", "teacher", "causal_init", "stage1", "stage2"]
    memory: MemorySpec | None  # of a causal model; null: the memory it was trained with
    view: TeacherView | None  # of a bidirectional model; null: the view it was trained with
    frames: PositiveInt  # latent frames of its videos, a real prefix included

    @model_validator(mode="after")
    def _check_kind_of_model(self) -> Self:
        kind, other = ("memory", "view") if self.weights in CAUSAL else ("view", "memory")
        if getattr(self, other) is not None:
            raise ValueError(f"weights is {self.weights}, which is run with a {kind}; set {other} to null")
        return self


class RecallProbe(Section):
    """One-step errors of the causal systems on held-out clips (cf_model/model/recall.py), from which `evaluate` takes the slow gain."""

    clips: PositiveInt  # held-out clips that are long enough
    start: Count  # latent frame from which on errors are measured; before it the clip is only read
    frames: PositiveInt  # that are measured, in whole chunks
    sigmas: list[Annotated[float, Field(gt=0, lt=1)]]  # noise levels


class Interventions(Section):
    """Continuations of contexts that differ in one fact (cf_model/data/interventions.py), of which `evaluate` takes effective context."""

    pairs: PositiveInt  # of worlds for each lag
    start: PositiveInt  # latent frame from which on the systems go on
    frames: PositiveInt  # latent frames that they make
    lags: list[Annotated[float, Field(ge=0)]]  # seconds, to twice as much, since the fact was last in view


class Generate(Section):
    """The videos that are compared: prompts and seeds, continued clips, and the systems that make them."""

    prompts: PositiveInt
    continued: PositiveInt  # held-out clips whose beginnings are continued
    continued_beside: PositiveInt  # of these, the first, that causal_init and memories which nothing was trained with continue
    prompts_file: Path | None  # one prompt a line; null: captions of the held-out clips
    seeds: list[Count]
    frames: PositiveInt  # latent frames of the real clips that are shown for comparison
    prefix: PositiveInt  # latent frames of a real clip that a continuation starts from
    batch: PositiveInt  # videos that a model makes at once, as far as they have prompts of one system; changes results by rounding alone
    sampler_steps: PositiveInt  # of the bidirectional models; causal models use the levels they were trained with
    guidance: Annotated[float, Field(ge=1)]
    guidance_passes: GuidancePasses
    crf: Annotated[int, Field(ge=0, le=51)]
    recall: RecallProbe
    interventions: Interventions
    systems: dict[str, System]  # text to video
    continuations: dict[str, System]  # of a real prefix

    def count_continued(self, name: str) -> int:
        """Return how many held-out clips a system of `continuations` goes on from, where there are as many."""
        system = self.continuations[name]
        beside = system.weights == "causal_init" or system.memory is not None
        return min(self.continued, self.continued_beside) if beside else self.continued


class Evaluate(Section):
    """Settings of the metrics."""

    gap: PositiveFloat  # seconds out of sight before a return counts in map_error
    absence: PositiveFloat  # seconds out of sight before a return counts in memory_ratio and map_error_absent
    sink: Count  # latent frames at a video's beginning; the headings that they show are always in a memory's sink and count in neither
    resamples: PositiveInt  # of the bootstrap
    choices: Annotated[int, Field(ge=2)]  # captions that the blind guess chooses from


class Params(Section):
    """All of params.yaml, each section valid by itself; tasks/params/load.py checks the sections against one another."""

    profile: str
    seed: Count
    threads: PositiveInt
    compute: Compute
    video: Video
    tracking: Tracking
    watch: list[CurveRule]
    engine: EngineSpec
    start: Start
    clips: Clips
    filter: Filter
    codec: CodecParams
    text: Text
    encode: Encode
    prompts: PromptSpec
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
