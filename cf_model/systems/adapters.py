"""Systems that make videos here: ours and imported ones by our own pipeline, others by their pipeline of diffusers.

Both read a folder on this machine; nothing is downloaded. A folder of videos that were made elsewhere needs no adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import diffusers
import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from cf_model.folder import PIPELINE_CLASS, RECIPE_FILE, read_json
from cf_model.pipeline import ContextForcingPipeline

from .system_facts import SYSTEMS, SystemFacts

Video = UInt8[np.ndarray, "V Y X 3"]


class VideoSystem(Protocol):
    """A system that makes a video from a prompt."""

    fps: int

    def count_frames(self, seconds: float) -> int:
        """Return the frames of a video of about so many seconds."""

    def describe(self) -> dict[str, Any]:
        """Return the settings that the videos depend on."""

    def make_video(self, prompt: str, *, seconds: float, seed: int, image: Path | None = None) -> Video:
        """Make a video; `image` is its first frame, for systems that begin from one."""


class NativeSystem:
    """A model folder of this project, run by its own recipe."""

    def __init__(self, pipeline: ContextForcingPipeline) -> None:
        self.pipeline, self.fps = pipeline, pipeline.recipe.fps

    def count_frames(self, seconds: float) -> int:
        """Return the frames of a video, which are exact."""
        return round(seconds * self.fps)

    def describe(self) -> dict[str, Any]:
        """Return the size; all else is in the folder."""
        return {"pipeline": PIPELINE_CLASS, "height": self.pipeline.recipe.height, "width": self.pipeline.recipe.width}

    def make_video(self, prompt: str, *, seconds: float, seed: int, image: Path | None = None) -> Video:
        """Make a video; the first frame is the system's own."""
        return self.pipeline(prompt, seconds=seconds, seed=seed)


class DiffusersSystem:
    """A pipeline of diffusers with the settings of SYSTEMS; `changes` are keywords of its call that replace those."""

    def __init__(self, facts: SystemFacts, pipeline: Any, changes: Mapping[str, Any]) -> None:
        self.facts, self.pipeline, self.fps = facts, pipeline, facts.fps
        self.call = {"height": facts.size[0], "width": facts.size[1], **facts.call, **changes}
        if facts.scheduler:
            pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **facts.scheduler)
        pipeline.set_progress_bar_config(disable=True)

    @property
    def step(self) -> int:
        """Frames that the video grows by: those of a latent frame, and for FramePack those of a whole window."""
        step = getattr(self.pipeline, "vae_scale_factor_temporal", None) or self.pipeline.vae_temporal_compression_ratio
        return step * self.call.get("latent_window_size", 1)

    def count_frames(self, seconds: float) -> int:
        """Return the nearest number of frames that the system can make: a multiple of its step, and one."""
        return max(1, round((seconds * self.fps - 1) / self.step)) * self.step + 1

    def describe(self) -> dict[str, Any]:
        """Return the pipeline's class and the keywords of its call."""
        about = {
            "pipeline": type(self.pipeline).__name__,
            "diffusers": diffusers.__version__,
            "dtype": str(self.pipeline.transformer.dtype),
        }
        return about | self.call | dict(self.facts.scheduler)

    def make_video(self, prompt: str, *, seconds: float, seed: int, image: Path | None = None) -> Video:
        """Make a video with noise that is drawn on the CPU, so that a seed means the same on every device."""
        frames, call = self.count_frames(seconds), dict(self.call)
        if image:
            call["image"] = Image.open(image).convert("RGB").resize((call["width"], call["height"]))
        if self.facts.pipeline == "AnyFlowFARPipeline" and "chunk_partition" not in call:
            call["chunk_partition"] = self.split_latents((frames - 1) // self.step + 1)
        if window := call.get("latent_window_size"):
            frames = (frames - 1) // self.step * ((window - 1) * self.step // window + 1)  # of which FramePack makes so many windows
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # some pipelines draw noise beside the generator's
            made = self.pipeline(prompt=prompt, num_frames=frames, generator=torch.Generator().manual_seed(seed), output_type="np", **call)
        return np.rint(np.asarray(made.frames[0]) * 255).clip(0, 255).astype(np.uint8)

    def split_latents(self, latents: int) -> list[int]:
        """Split latent frames into chunks as the transformer was trained, and go on with its second chunk's length."""
        first, *others = self.pipeline.transformer.config.chunk_partition
        chunk = others[0] if others else first
        parts = [first, *[chunk] * ((latents - first) // chunk)]
        return parts + ([latents - sum(parts)] if latents > sum(parts) else [])


def identify_system(name: str, weights: Path) -> tuple[SystemFacts | None, int]:
    """Return what is known of the pipeline of diffusers that a folder holds, or None for a model of this project; and frames a second.

    No weights are read. ValueError for a folder that is of neither, and for a system whose videos can't be made here.
    """
    index = weights / "model_index.json"
    kind = read_json(index).get("_class_name") if index.is_file() else None
    if kind == PIPELINE_CLASS:
        return None, int(read_json(weights / RECIPE_FILE)["fps"])
    facts = SYSTEMS.get(name)
    if facts is None or facts.adapter != "diffusers":
        names = ", ".join(key for key, one in SYSTEMS.items() if one.adapter == "diffusers")
        why = {
            "folder": "its videos are made by its own code; score them by `cf score --videos DIR --manifest FILE`",
            "published": "only printed numbers of it are here",
        }.get(facts.adapter if facts else "", f"{weights} is no model of this project, and pipelines of diffusers are {names}")
        raise ValueError(f"--system {name} makes no videos here: {why}")
    if kind != facts.pipeline:
        raise ValueError(f"--weights {weights} holds {kind or 'no model_index.json'}, and {name} needs a {facts.pipeline}: {facts.weights}")
    return facts, facts.fps


def open_system(name: str, weights: Path, device: torch.device, changes: Mapping[str, Any]) -> VideoSystem:
    """Open the system `name` from the folder `weights`: a model of ours under any name, or a known pipeline of diffusers.

    `changes` are keywords of the pipeline's call. ValueError as identify_system, and for `changes` of a model of ours.
    """
    facts, _ = identify_system(name, weights)
    half = device.type == "cuda"
    if facts:
        dtype = torch.bfloat16 if half else torch.float32
        pipeline = getattr(diffusers, str(facts.pipeline)).from_pretrained(weights, dtype=dtype, local_files_only=True)
        return DiffusersSystem(facts, pipeline.to(device), changes)
    if changes:
        raise ValueError(
            f"--set changes a pipeline of diffusers, and {weights} is a model of this project; `cf video --memory` changes one"
        )
    ours = ContextForcingPipeline.from_pretrained(weights, dtype="bfloat16" if half else "float32")
    return NativeSystem(ours.to(device))
