"""Traces kept in files, so that a video that was measured is not decoded and encoded again when another protocol is asked for.

A file's name is a hash of all that a trace depends on: the video's bytes, the rate, the networks and the code that measures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cf_model.metrics.trace import Networks, Trace, describe_weights

FACTS = ("frames", "fps", "height", "width", "preview_fps")
GROUPS = ("features", "statistics")
ARRAYS = ("differences", "interpolation", "magnitudes", "sampled_flow", "imaging", "thumbnails", "preview")


def describe_trace(networks: Networks, video: str, fps: float | None, code: str) -> dict[str, Any] | None:
    """Return all that a trace depends on; None where a quality network without an identity is plugged in, whose ratings can't be kept.

    `video` and `code` are hashes; `fps` is None for a video's own rate.
    """
    if networks.quality:
        return None
    made_with = {"flow": networks.flow_name if networks.make_flow else None, "interpolator": networks.interpolator}
    return made_with | {"video": video, "fps": fps, "code": code, "weights": dict(describe_weights(networks))}


def write_trace(file: Path, trace: Trace, about: Mapping[str, Any]) -> None:
    """Write a trace, whole or not at all, with what it depends on."""
    found = {name: value for name in ARRAYS if (value := getattr(trace, name)) is not None}
    found |= {f"{group}/{name}": value for group in GROUPS for name, value in getattr(trace, group).items()}
    if trace.anchors:
        numbers = sorted(trace.anchors)
        found |= {"anchors": np.stack([trace.anchors[k] for k in numbers]), "anchor_frames": np.array(numbers)}
    facts = {name: getattr(trace, name) for name in FACTS}
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        save_file({name: np.ascontiguousarray(value) for name, value in found.items()}, part,
                  {"facts": json.dumps(facts), "about": json.dumps(about)})  # fmt: skip
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def read_trace(file: Path) -> tuple[Trace, dict[str, Any]] | None:
    """Read a trace and what it depends on; None where there is none, or a damaged file, which the next writing replaces."""
    try:
        with safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata()
            trace = Trace(**json.loads(metadata["facts"]))
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    if "anchors" in found:
        trace.anchors = dict(zip(found.pop("anchor_frames").tolist(), found.pop("anchors"), strict=True))
    for name, value in found.items():
        group, _, part = name.partition("/")
        if part:
            getattr(trace, group)[part] = value
        else:
            setattr(trace, group, value)
    return trace, json.loads(metadata["about"])
