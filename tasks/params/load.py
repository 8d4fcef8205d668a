"""params.yaml as `Params`: every value by its type, then the rules between the sections, which no section can check by itself.

Each rule raises ValueError with one sentence: key, value, rule, and the values that would pass. Pydantic's errors become such a sentence.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from cf_model.codec.interface import latent_frames
from cf_model.model.kernels import WITHOUT_MASK
from cf_model.model.memory import MemorySpec
from cf_model.train.layout import TeacherLayout
from tasks.files.words import count_things

from .nightly import CAPTIONS, COLLECTIONS, HELDOUT, RENDERED
from .schema import CAUSAL, Params
from .yaml_file import COMPLETE, Refused, read_yaml


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and validate a parameter file; raise Refused with one sentence that begins with its path."""
    return validate_params(read_yaml(path), path)


def validate_params(tree: Mapping[str, Any], path: Path) -> Params:
    """Turn the tree of a parameter file into types and check it; `path` is where the refusal says that the fault stands."""
    try:
        params = Params.model_validate(tree)
        for check in RULES:
            check(params)
    except ValidationError as error:
        raise Refused(explain_first_error(error, Params, path)) from None
    except ValueError as error:
        raise Refused(f"{path}: {error}") from None
    return params


def explain_first_error(error: ValidationError, model: type[BaseModel], path: Path) -> str:
    """Describe the first error that names its cause, and count the others."""
    errors = error.errors(include_url=False)
    # A misspelled key is also a missing key. Unknown keys come first because their sentence names the right spelling.
    errors.sort(key=lambda entry: entry["type"] not in ("extra_forbidden", "unexpected_keyword_argument"))
    # Every error inside an optional section adds `should be None`, which says nothing beside the others.
    first, *others = [entry for entry in errors if entry["type"] != "none_required"] or errors
    more = f" ({len(others)} more after this one)" if others else ""
    return f"{path}: {_describe_error(first, model)}{more}"


def _describe_error(error: Any, model: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    value = error.get("input")
    match error["type"]:
        case "missing":
            return f"{where} is missing; {COMPLETE}"
        case "extra_forbidden" | "unexpected_keyword_argument":
            return f"{where} is not a parameter; {_suggest_key(error['loc'], model)}"
        case "value_error":
            return _locate_spec_error(where, value, str(error["ctx"]["error"]))
    rule = error["msg"].removeprefix("Input should be ").removeprefix("a valid ").split(", unable to")[0]
    stated = f"a section of {count_things(len(value), 'key')}" if isinstance(value, Mapping) else repr(value)
    return f"{where} is {stated}; it must be {rule}"


def _locate_spec_error(where: str, value: Any, message: str) -> str:
    """Put the section before a message of cf_model's dataclasses, which begins with a field's name and knows no section."""
    name = re.split(r"\W", message, maxsplit=1)[0]
    fields = value if isinstance(value, Mapping) else getattr(value, "kwargs", None) or {}
    return f"{where}.{message}" if where and name in fields else f"{where}: {message}".removeprefix(": ")


def _suggest_key(loc: tuple[Any, ...], model: type[BaseModel]) -> str:
    schema = model.model_json_schema()
    names = _list_keys(schema, schema, loc[:-1])
    close = difflib.get_close_matches(str(loc[-1]), names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {'.'.join([*map(str, loc[:-1]), close[0]])}?"
    return f"known there: {', '.join(names)}" if names else "take it out"


def _list_keys(schema: dict[str, Any], node: dict[str, Any], loc: tuple[Any, ...]) -> list[str]:
    """List the keys that the JSON schema allows at a location, in all alternatives of a union (`Memory | None`)."""
    if "$ref" in node:
        return _list_keys(schema, schema["$defs"][node["$ref"].rsplit("/", 1)[-1]], loc)
    if "anyOf" in node:
        return [name for branch in node["anyOf"] for name in _list_keys(schema, branch, loc)]
    if not loc:
        return list(node.get("properties", {}))
    named = node.get("additionalProperties") or next(iter(node.get("patternProperties", {}).values()), None)  # the user names the keys
    inner = node.get("properties", {}).get(loc[0]) or named
    # The location of an error also names the branch of a union, which is no key of the file: such a part is skipped.
    return _list_keys(schema, inner, loc[1:]) if isinstance(inner, dict) else _list_keys(schema, node, loc[1:])


def check_weights_are_named(p: Params) -> None:
    """Require a source of weights for every network that is imported, and none for those that are trained from scratch."""
    kinds = {"codec": (p.codec.kind, "wan"), "text": (p.text.kind, "umt5"), "base": (p.base.init, "wan")}
    for name, (kind, imported) in kinds.items():
        section, key = getattr(p, name), "init" if name == "base" else "kind"
        if kind == imported and section.weights is None:
            raise ValueError(f"{name}.weights is null, but {name}.{key} is {imported}; name a folder, or a name on the Hugging Face Hub")
        if kind != imported and section.weights is not None:
            raise ValueError(f"{name}.weights is {section.weights}, but {name}.{key} is {kind}, which has no weights to read; use null")


def check_picture_size(p: Params) -> None:
    """Require whole tokens (16 pixels) and whole units of a rendered world (1/32 of its height)."""
    grid = 32 if p.clips.source == "worlds" else 16
    for name, value, step in (("height", p.video.height, grid), ("width", p.video.width, 16)):
        if value % step:
            raise ValueError(f"video.{name} is {value}, not a multiple of {step}; use {value // step * step + step}")


def check_clip_lengths(p: Params) -> None:
    """Require rendered clips as long as the longest window of training, and more clips than are held out or generated from."""
    if p.clips.source == "worlds":
        available = latent_frames(p.clips.frames)
        needed = {"base.window": p.base.window, "generate.prefix": p.generate.prefix}
        needed |= {"teacher.longest + teacher.target": p.teacher.longest + p.teacher.target}
        needed |= {"causal_init.longest + causal_init.frames": p.causal_init.longest + p.causal_init.frames}
        for name, frames in needed.items():
            if frames > available:
                clips = f"clips.frames is {p.clips.frames}, so {available}"
                raise ValueError(f"{name} is {frames} latent frames, but {clips}; use longer clips")
        if p.clips.count <= p.filter.heldout:
            raise ValueError(f"filter.heldout is {p.filter.heldout} of clips.count {p.clips.count}; leave some to train on")
    for name, count in (("prompts", p.generate.prompts), ("continued", p.generate.continued)):
        if count > p.filter.heldout and (name == "continued" or p.generate.prompts_file is None):
            raise ValueError(f"generate.{name} is {count}, but only filter.heldout {p.filter.heldout} clips are held out; use at most that")


def check_ode_frames(p: Params) -> None:
    """Limit ODE regression to one window of the base model, because the base model makes the videos that it regresses on."""
    if p.causal_init.method == "ode" and p.causal_init.frames > p.base.window:
        lengths = f"causal_init.frames is {p.causal_init.frames}, but base.window is {p.base.window}"
        raise ValueError(f"{lengths}, and by method ode the base model makes those frames; use at most that, or method: teacher_forcing")


def check_student_layouts(p: Params) -> None:
    """Require that the teacher judges layouts that it was trained on, and that all causal stages cut videos into the same chunks."""
    trained, wanted = TeacherLayout(p.teacher.view, p.teacher.target, p.teacher.longest), p.stage2.want_layout(p.teacher.view)
    trained.check(wanted, accept=p.stage2.teacher.mismatch == "accept")
    if p.stage1.teacher.context != "none":
        raise ValueError(f"stage1.teacher.context is {p.stage1.teacher.context}, but the base model knows no context; use none")
    chunk = p.stage2.rollout.chunk
    for name, frames in (("samples.teacher.prefix", p.samples.teacher.prefix), ("teacher.target", p.teacher.target)):
        if p.teacher.view.context == "memory" and frames % p.teacher.view.chunk:
            raise ValueError(f"{name} is {frames}, but teacher.view.context is memory; use whole chunks of {p.teacher.view.chunk}")
    for name, other in (("causal_init", p.causal_init.chunk), ("stage1.rollout", p.stage1.rollout.chunk)):
        if other != chunk:
            raise ValueError(f"{name}.chunk is {other}, but stage2.rollout.chunk is {chunk}; use the same")
    if p.generate.prefix % chunk:
        fitting = p.generate.prefix // chunk * chunk or chunk
        raise ValueError(f"generate.prefix is {p.generate.prefix}, not whole chunks of {chunk} latent frames; use {fitting}")
    lengths = {"frames": p.generate.frames} | {f"continuations.{n}.frames": s.frames for n, s in p.generate.continuations.items()}
    for name, frames in lengths.items():
        if frames <= p.generate.prefix:
            raise ValueError(f"generate.{name} is {frames}, no more than generate.prefix {p.generate.prefix}; use more")


def check_systems(p: Params) -> None:
    """Require that the compared systems have names of folders, memories of whole chunks, and the teacher's way to read context."""
    for name, system in [*p.generate.systems.items(), *p.generate.continuations.items()]:
        if not re.fullmatch(r"[a-z0-9_]+", name) or name == "real":
            raise ValueError(f"generate names a system {name!r}; use small letters, digits and _, and not real: it names a folder")
        if system.memory:
            system.memory.check_chunk(p.stage2.rollout.chunk)
        read, trained = system.view and system.view.context != "none" and system.view.context_pass, p.teacher.view.context_pass
        if read and read != trained:
            raise ValueError(f"generate's {name} has view.context_pass {read}, but teacher.view.context_pass is {trained}; use the same")
    probe, chunk = p.generate.interventions, p.stage2.rollout.chunk
    for key, frames in (("start", probe.start), ("frames", probe.frames)):
        if frames % chunk:
            whole = frames // chunk * chunk + chunk
            raise ValueError(f"generate.interventions.{key} is {frames}, not whole chunks of {chunk} latent frames; use {whole}")


def check_engine(p: Params) -> None:
    """Refuse ZeRO 3 with a context pass of its own and no checkpointing: the gradient of such a pass can't be gathered."""
    if p.engine.zero == 3 and p.teacher.view.context_pass == "own" and not p.compute.checkpointing:
        cause = "engine.zero is 3 and teacher.view.context_pass own, whose gradient ZeRO 3 can't take"
        raise ValueError(f"{cause}; use compute.checkpointing: true, engine.zero: 2, or context_pass: joint")


def check_attention(p: Params) -> None:
    """Refuse kernels without a mask for batches whose videos decide for themselves: they remember different numbers of frames."""
    if p.compute.attention not in WITHOUT_MASK:
        return
    cause = f"compute.attention is {p.compute.attention}, which can't be told that the videos of a batch remember different frames"
    for stage in CAUSAL:
        spec = getattr(p, stage)
        if _decides_by_video(spec.memory) and spec.batch > 1 and p.engine.micro_batch != 1:
            batch = f"engine.micro_batch is {p.engine.micro_batch} and {stage}.batch {spec.batch}"
            raise ValueError(f"{cause}, but {batch}; use engine.micro_batch: 1, or attention: native or cudnn")
    systems = [system for system in (*p.generate.systems.values(), *p.generate.continuations.values()) if system.weights in CAUSAL]
    if p.generate.batch > 1 and any(_decides_by_video(system.memory or getattr(p, system.weights).memory) for system in systems):
        raise ValueError(f"{cause}, but generate.batch is {p.generate.batch}; use generate.batch: 1, or attention: native or cudnn")


def _decides_by_video(memory: MemorySpec) -> bool:
    """Return whether the videos of a batch may promote different frames."""
    return memory.promote == "similarity" and memory.slow > 0 and memory.tau > -1


def check_starts(p: Params) -> None:
    """Require that `start` and the night's inbox name what is used: DVC tracks the files that `start` names."""
    own = p.clips.source in ("folder", "table")
    used = p.clips.folder if own else RENDERED if p.clips.source == "worlds" else COLLECTIONS
    if p.start.clips != used:
        source = f"clips.source is {p.clips.source}" + (f" and clips.folder {p.clips.folder}" if own else "")
        raise ValueError(f"start.clips is {p.start.clips}, but {source}; set start.clips to {used}, so that DVC sees when it changes")
    if p.nightly.inbox is not None and (p.clips.folder is None or p.clips.folder.is_absolute()):
        folders = f"nightly.inbox is {p.nightly.inbox}, but clips.folder is {p.clips.folder}"
        raise ValueError(f"{folders}; name a folder of the project that `dvc add` tracks, such as raw, for new clips to go into")
    for key, file in (("generate", p.generate.prompts_file), ("nightly", p.nightly.prompts_file)):
        if file == HELDOUT and (p.start.prompts == CAPTIONS or not p.prompts.heldout):
            cause = f"{key}.prompts_file is {HELDOUT}, but start.prompts is {p.start.prompts} and prompts.heldout {p.prompts.heldout:g}"
            raise ValueError(f"{cause}, so that no prompt is held out; hold out a share of a file's prompts, or name another file")


def check_samples(p: Params) -> None:
    """Require sample videos that each training stage can make: held-out prompts, its window, and whole chunks."""
    for stage in ("base", "teacher", "causal_init", "stage1", "stage2"):
        spec = getattr(p.samples, stage)
        if spec.every and spec.prompts > p.filter.heldout:
            counts = f"samples.{stage}.prompts is {spec.prompts}, but only filter.heldout {p.filter.heldout} clips are held out"
            raise ValueError(f"{counts}; use at most that")
    if p.samples.base.frames > p.base.window:
        raise ValueError(f"samples.base.frames is {p.samples.base.frames}, but base.window is {p.base.window}; use at most that")
    teacher, most = p.samples.teacher, p.samples.teacher.prefix + p.teacher.target
    if teacher.frames > most:
        real = f"samples.teacher.frames is {teacher.frames}, of which {teacher.prefix} are real"
        raise ValueError(f"{real}, but teacher.target is {p.teacher.target}; use at most {most}")
    chunks = {"causal_init": p.causal_init.chunk, "stage1": p.stage1.rollout.chunk, "stage2": p.stage2.rollout.chunk}
    for stage, chunk in chunks.items():
        frames = getattr(p.samples, stage).frames
        if frames % chunk:
            down = frames // chunk * chunk
            fitting = f"{down} or {down + chunk}" if down else f"{chunk}"
            raise ValueError(f"samples.{stage}.frames is {frames}, not whole chunks of {chunk} latent frames; use {fitting}")


RULES: tuple[Callable[[Params], None], ...] = (check_weights_are_named, check_picture_size, check_clip_lengths, check_ode_frames)
RULES += (check_student_layouts, check_systems, check_engine, check_attention, check_starts, check_samples)
