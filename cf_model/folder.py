"""Model folders in diffusers' layout: weights as safetensors, all settings as JSON, and a card for people.

model_index.json       what each part is
transformer/           diffusers' WanTransformer3DModel
vae/ or codec/         diffusers' AutoencoderKLWan, or the linear codec
text.json              which text encoder; UMT5 lies in text_encoder/ and tokenizer/
context_forcing.json   the recipe: memory, chunk, levels, flow, frame rate and size
README.md              the model card
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import diffusers

from cf_model.codec.codec_file import load_codec, save_codec
from cf_model.codec.interface import Codec
from cf_model.codec.linear import LinearCodec
from cf_model.text.encoder import TextEncoder, load_text_encoder, save_text_encoder

from .model import wan
from .model.denoiser import Compute, Denoiser
from .model.flow import Flow, check_levels_fall
from .model.memory import MemorySpec
from .model.weights import check_safetensors_header

T = TypeVar("T")
PIPELINE_CLASS = "ContextForcingPipeline"
RECIPE_FILE = "context_forcing.json"
# of the pipeline, what a model is that is not the finished student
INTERMEDIATE = {"causal_init": "which knows only real videos", "stage1": "which has learned short videos without a context"}
EXPORT_HINT = "`cf export --to diffusers --model {} --out DIR` makes one"


@dataclass(frozen=True)
class Recipe:
    """Settings that a student must be run with, because it was trained with them."""

    memory: MemorySpec
    chunk: int  # latent frames that are denoised together
    levels: tuple[float, ...]  # of noise, before the flow's shift
    flow: Flow
    fps: int
    height: int  # of the video, in pixels
    width: int
    made: str  # how the weights were made, in a sentence for the card
    licence: str  # of the weights

    def __post_init__(self) -> None:
        if self.height % 16 or self.width % 16 or min(self.height, self.width, self.fps, self.chunk) < 1:
            problem = f"height, width, fps and chunk are {self.height}, {self.width}, {self.fps}, {self.chunk}"
            raise ValueError(f"{problem}; the first two are multiples of 16, all are above 0")
        self.memory.check_chunk(self.chunk)
        check_levels_fall(self.levels)


def save_folder(path: Path, denoiser: Denoiser, codec: Codec, text: TextEncoder, recipe: Recipe) -> None:
    """Write a model folder, under a temporary name until it is complete. Raises ValueError if `path` exists."""
    if path.exists():
        raise ValueError(f"{path} is already there; name another folder, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{path.name}.partial-", dir=path.parent))
    part.chmod(0o755)  # mkdtemp lets nobody but the owner read
    try:
        write_parts(part, path.name, denoiser, codec, text, recipe)
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_parts(path: Path, name: str, denoiser: Denoiser, codec: Codec, text: TextEncoder, recipe: Recipe) -> None:
    """Write all parts of a model folder; `name` is the model's in its card."""
    wan.save_transformer(denoiser, path / "transformer")
    home = "codec" if isinstance(codec, LinearCodec) else "vae"
    save_codec(codec, path / home)
    save_text_encoder(text, path)
    index: dict[str, Any] = {"_class_name": PIPELINE_CLASS, "_diffusers_version": diffusers.__version__}
    index["transformer"] = ["diffusers", "WanTransformer3DModel"]
    index[home] = ["cf_model.codec.linear", "LinearCodec"] if home == "codec" else ["diffusers", "AutoencoderKLWan"]
    if (path / "text_encoder").is_dir():
        index |= {"text_encoder": ["transformers", "UMT5EncoderModel"], "tokenizer": ["transformers", "T5TokenizerFast"]}
    write_json(path / "model_index.json", index)
    write_json(path / RECIPE_FILE, asdict(recipe))
    (path / "README.md").write_text(write_card(name, denoiser, recipe), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def load_folder(path: Path, compute: Compute) -> tuple[Denoiser, Codec, TextEncoder, Recipe]:
    """Load all parts of a model folder; a ValueError says what is missing, damaged or of another layout."""
    check_layout(path)
    for file in sorted(path.rglob("*.safetensors")):
        check_safetensors_header(file)
    recipe = build_typed(Recipe, read_json(path / RECIPE_FILE), f"{path / RECIPE_FILE}: ")
    home = path / "vae" if (path / "vae").is_dir() else path / "codec"
    return wan.load_transformer(path / "transformer", compute), load_codec(home), load_text_encoder(path), recipe


def check_layout(path: Path) -> None:
    """Raise ValueError for any other layout, with its name and the command that converts it to a model folder."""
    if not path.is_dir():
        raise ValueError(f"{path} is no folder; {EXPORT_HINT.format('models/stage2')}")
    index = read_json(path / "model_index.json") if (path / "model_index.json").is_file() else {}
    kind = index.get("_class_name")
    if kind == PIPELINE_CLASS:
        missing = [name for name in (RECIPE_FILE, "transformer/config.json") if not (path / name).is_file()]
        if missing:
            raise ValueError(f"{path} lacks {missing[0]}; copy the folder again, or {EXPORT_HINT.format('models/stage2')}")
        return
    imported = f"`cf import-weights {path} --out WEIGHTS`, then {EXPORT_HINT.format('WEIGHTS')}"
    if kind:
        raise ValueError(f"{path} is a diffusers {kind} and has no memory or rollout settings; {imported}")
    if (path / "config.json").is_file():
        raise ValueError(f"{path} is a transformer alone, as the stages write it; {EXPORT_HINT.format(path)}")
    if (path / "codec.json").is_file():
        raise ValueError(f"{path} is a codec alone; {EXPORT_HINT.format('models/stage2')}")
    foreign = next((file for end in ("pt", "pth", "ckpt", "bin", "safetensors") for file in sorted(path.glob(f"*.{end}"))), None)
    if foreign:
        raise ValueError(f"{path} holds {foreign.name}, weights in a layout of Self-Forcing or original Wan; {imported}")
    raise ValueError(f"{path} holds no model_index.json, so it is no model folder; {EXPORT_HINT.format('models/stage2')}")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; raises ValueError if the file holds anything else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{file} is not a JSON object; copy or make it again")
    return values


def build_typed(kind: type[T], values: Any, where: str) -> T:
    """Build a dataclass from stated values: every key, no other key, each of its type. A ValueError begins with `where`."""
    hints = get_type_hints(kind)
    if not isinstance(values, Mapping):
        raise ValueError(f"{where.rstrip(':. ')} is {values!r}; it must be a section of {', '.join(hints)}")
    for name in [*values, *hints]:
        if name not in hints:
            raise ValueError(f"{where}{name} is not a setting; known are {', '.join(hints)}")
        if name not in values:
            raise ValueError(f"{where}{name} is missing; every value is stated")
    typed = {name: _convert_value(hint, values[name], f"{where}{name}") for name, hint in hints.items()}
    try:
        return kind(**typed)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None


def _convert_value(hint: Any, value: Any, where: str) -> Any:
    """Return a value of the hinted type: a dataclass, a Literal, a tuple or a plain type."""
    if is_dataclass(hint):
        return build_typed(hint, value, f"{where}.")  # type: ignore[arg-type]
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{where} is {value!r}; it must be {', '.join(get_args(hint))}")
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} is {value!r}; it must be a list of numbers")
        return tuple(_convert_value(get_args(hint)[0], element, where) for element in value)
    kinds = (int, float) if hint is float else (hint,)
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ValueError(f"{where} is {value!r}; it must be {' or '.join(kind.__name__ for kind in kinds)}")
    return hint(value)


def write_card(name: str, denoiser: Denoiser, recipe: Recipe) -> str:
    """Return the model card: README.md with the head that model hubs read."""
    memory, config = recipe.memory, denoiser.transformer.config
    settings = "\n".join(f"| memory.{f.name} | {getattr(memory, f.name)} |" for f in fields(memory))
    size = sum(p.numel() for p in denoiser.parameters())
    return f"""---
license: {recipe.licence.lower()}
pipeline_tag: text-to-video
library_name: diffusers
tags: [context-forcing, autoregressive-video, long-video]
---
# {name}

A causal few-step text-to-video student with a slow-fast memory (Context Forcing, arXiv 2602.06028): it makes {recipe.chunk} latent frames
at a time, remembers at most {memory.size} of them, and goes on for as long as one likes.

**How it was made.** {recipe.made}

**Licence of the weights.** {recipe.licence}. The code that reads them is Apache-2.0.

## Run it
```
cf video --model {name} --prompt "..." --seconds 60 --seed 0 --out video.mp4
```
```python
from cf_model.pipeline import ContextForcingPipeline

pipe = ContextForcingPipeline.from_pretrained("{name}")
video = pipe("...", seconds=60, seed=0)           # uint8 [frames, {recipe.height}, {recipe.width}, 3], {recipe.fps} a second
for frame in pipe.stream("...", seconds=600): ...  # as they are made; memory use does not grow
```

## What it is
| | |
|---|---|
| transformer | diffusers' WanTransformer3DModel, {config.num_layers} layers, {size:,} parameters |
| video | {recipe.width} x {recipe.height}, {recipe.fps} frames a second |
| noise levels | {", ".join(f"{level:g}" for level in recipe.levels)}, shift {recipe.flow.shift:g} |
{settings}

The transformer runs in any diffusers pipeline that takes a WanTransformer3DModel, but without its memory: {RECIPE_FILE} is what
makes the difference, and only this project's pipeline reads it.
"""


def describe_origin(model: Path, system: str, profile: str, seed: int) -> tuple[str, str]:
    """Return two values for the model card: a sentence on how the weights were made, and the usual licence of such weights.

    `system`: whose memory and rollout the model is run with; `profile` and `seed`: of the parameters.
    """
    file = model / "import.json"
    if not file.is_file():
        stage = f"the stage `{model.name}` of context-forcing's pipeline"
        maker = stage if model.name in (*INTERMEDIATE, "stage2") else f"context-forcing (folder {model.name})"
        made = f"By {maker}, profile `{profile}`, seed {seed}"
        made += "." if model.name == system else f", run with the settings of `{system}`."
        if model.name in INTERMEDIATE:
            made += f" It is an intermediate of the pipeline, {INTERMEDIATE[model.name]}; the finished student is that of stage2."
        return made, "Apache-2.0"
    facts = json.loads(file.read_text(encoding="utf-8"))
    source = Path(str(facts.get("source", "unknown"))).name
    made = f"Not by this project: imported from {source} ({facts.get('layout', 'unknown')})"
    return f"{made}, run with the settings of `{system}` in profile `{profile}`.", "other"


def change_values(spec: Any, settings: list[str], where: str) -> Any:
    """Return a dataclass with the values that KEY=VALUE settings name. A ValueError for a malformed one begins with `where`."""
    hints, values = get_type_hints(type(spec)), asdict(spec)
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"{where}{setting} has no =; write KEY=VALUE, such as interval=4")
        kind = hints.get(name, str)
        try:
            values[name] = value if get_args(kind) else kind(value)
        except ValueError:
            number = "whole number" if kind is int else "number"
            raise ValueError(f"{where}{setting} is no {number}; write {name}={values[name]} or the like") from None
    return build_typed(type(spec), values, where)
