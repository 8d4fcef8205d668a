"""A trained student as something to call: a prompt in, frames out, for as long as one likes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, Unpack

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from cf_model.codec.interface import Codec
from cf_model.text.encoder import TextEncoder

from . import folder
from .folder import Recipe
from .model.denoiser import Attention, Compute, Denoiser, Precision
from .model.memory import LayerMemories, Memory, empty_memory
from .model.rollout import denoise_chunk
from .request import Prompts, RequestPlan, Switch, plan_request

FLUSH_FRAMES = 2  # newest latent frames that Infinity-RoPE's flush leaves beside the sink


@dataclass(frozen=True, eq=False)
class Chunk:
    """One chunk of a video as it comes, and what of the past was held while it was made."""

    first: int  # latent frame, counted from the beginning of the clip that is continued
    latents: int
    frames: UInt8[np.ndarray, "V Y X 3"]
    context: dict[str, list[int]]  # latent frames in sink, slow and fast; this chunk's own are not among them
    promoted: tuple[int, ...]  # of the slow ones, those that were not there a chunk before
    similarity: float | None  # of the chunk before to the one before it (eq. 7), the mean over layers
    prompt: str
    real: bool  # of the clip that is continued, and not made


class Options(TypedDict, total=False):
    """Keywords of `ContextForcingPipeline.chunks`, which says what they mean and what they are when left out."""

    seconds: float
    seed: int
    switch: Switch
    keep_sink: bool
    continue_from: UInt8[np.ndarray, "V0 Y X 3"] | None


class ContextForcingPipeline:
    """In the manner of diffusers' pipelines, but with the paper's loop: chunk after chunk with a bounded memory (alg. 1).

        pipe = ContextForcingPipeline.from_pretrained("out").to("cuda")
        video = pipe("a red fox in the snow", seconds=60, seed=0)  # uint8 [V, Y, X, 3]
        for frame in pipe.stream("a red fox in the snow", seconds=600): ...

    The same seed gives the same frames on the same machine. What is held does not grow with the video, unless
    the memory's positions are absolute, whose table ends: then a longer video is refused.
    """

    def __init__(self, denoiser: Denoiser, codec: Codec, text: TextEncoder, recipe: Recipe) -> None:
        config = denoiser.transformer.config
        for name, ours, there, theirs in (
            ("codec", codec.channels, "in_channels", config.in_channels),
            ("text encoder", text.channels, "text_dim", config.text_dim),
        ):
            if ours != theirs:
                raise ValueError(f"the {name} has {ours} channels, but the transformer's {there} is {theirs}; use what it was trained with")
        if recipe.memory.size > config.rope_max_seq_len:
            stated = f"memory sink + slow + fast is {recipe.memory.size}"
            raise ValueError(f"{stated}, but the RoPE table has {config.rope_max_seq_len} positions; hold fewer frames")
        self.denoiser, self.codec, self.text, self.recipe = denoiser.eval(), codec, text, recipe
        self.device = torch.device("cpu")

    @classmethod
    def from_pretrained(cls, path: str | Path, attention: Attention = "native", dtype: Precision = "float32") -> ContextForcingPipeline:
        """A folder that `save_pretrained` or `cf export --to diffusers` wrote; nothing is ever downloaded."""
        return cls(*folder.load_folder(Path(path), Compute(attention, dtype, checkpointing=False)))

    def save_pretrained(self, path: str | Path) -> None:
        """diffusers' layout in a new folder, which appears under its name when it is whole."""
        folder.save_folder(Path(path), self.denoiser, self.codec, self.text, self.recipe)

    def to(self, device: str | torch.device) -> ContextForcingPipeline:
        self.device = torch.device(device)
        for part in (self.denoiser, self.codec, self.text):
            part.to(self.device)
        return self

    def __call__(self, prompt: Prompts, **options: Unpack[Options]) -> UInt8[np.ndarray, "V Y X 3"]:
        """`seconds` of new video, to the frame; prompt and options are those of `chunks`."""
        return np.concatenate([chunk.frames for chunk in self.chunks(prompt, **options) if not chunk.real])

    def stream(self, prompt: Prompts, **options: Unpack[Options]) -> Iterator[UInt8[np.ndarray, "Y X 3"]]:
        """The frames of a call, each as soon as its chunk is made."""
        made = self.chunks(prompt, **options)
        return (frame for chunk in made if not chunk.real for frame in chunk.frames)

    def chunks(
        self,
        prompt: Prompts,
        *,
        seconds: float = 60,
        seed: int = 0,
        switch: Switch = "recache",
        keep_sink: bool = True,
        continue_from: UInt8[np.ndarray, "V0 Y X 3"] | None = None,
    ) -> Iterator[Chunk]:
        """Chunks of round(seconds * fps) frames of new video; the last chunk is cut.

        `prompt` is one text, or several with the seconds of new video from which on they are in force: (0, first),
        (12.5, second), … A chunk is made with the prompt in force at its first frame. At a change of prompt `switch` says
        what becomes of the memory: "recache" empties it and passes the newest frames again with the new prompt, as many
        whole chunks as it holds (LongLive; `keep_sink` is its global_sink), "flush" leaves the sink and the newest two
        latent frames (Infinity-RoPE), "keep" leaves it as it is.

        `continue_from` is a clip that the video goes on from: its end, in whole chunks of latent frames, is remembered
        first, and its chunks come first, as they are, marked `real`.
        """
        positions = self.denoiser.transformer.config.rope_max_seq_len
        plan = plan_request(self.recipe, self.text, positions, prompt, seconds, seed, switch, continue_from)
        text = {at: self.text.encode([words]).to(self.device) for at, words in plan.prompts.items()}
        clip = None if continue_from is None else continue_from[len(continue_from) - plan.real :]
        return self._decoded(self._made(plan, text, clip, seed, switch, keep_sink), plan, clip)

    # ----------------------------------------------------------------------------------------------------- the loop

    def _made(
        self, plan: RequestPlan, text: dict[int, Tensor], clip: np.ndarray | None, seed: int, switch: Switch, keep_sink: bool
    ) -> Iterator[tuple[Chunk, Float[Tensor, "B F C H W"]]]:
        """Latents of the clip's chunks and then of new ones; the frames are still missing."""
        recipe, rng = self.recipe, torch.Generator(self.device).manual_seed(seed)
        sigmas, space = recipe.flow.shift_levels(recipe.levels), self.codec.space
        shape = self.codec.channels, recipe.height // space, recipe.width // space
        memory, now = empty_memory(recipe.memory), text[0]
        kept: tuple[int, ...] = ()
        recent: deque[Tensor] = deque(maxlen=max(1, recipe.memory.size // recipe.chunk))  # what a recache passes again
        real = self._encoded(clip).split(recipe.chunk, dim=1) if clip is not None else ()
        for number in range(-len(real), plan.chunks):
            if number > 0 and number in text:
                now = text[number]
                memory = self._switched(memory, torch.cat(list(recent), dim=1), now, switch, keep_sink)
            before, kept = kept, promoted_indices(memory)
            at = max(key for key in plan.prompts if key <= max(number, 0))
            chunk = Chunk(
                first=(number + len(real)) * recipe.chunk,
                latents=recipe.chunk,
                frames=np.zeros((0, recipe.height, recipe.width, 3), np.uint8),
                context=memory.frame_indices(),
                promoted=tuple(index for index in kept if index not in before),
                similarity=sum(memory.similarity) / len(memory.similarity) if memory.similarity else None,
                prompt=plan.prompts[at],
                real=number < 0,
            )
            with torch.no_grad():
                if number < 0:
                    x_0 = real[number]
                else:
                    x_0, _, memory = denoise_chunk(self.denoiser, now, shape, sigmas, recipe.chunk, memory, rng)
                memory = self.denoiser.remember(x_0, now, memory)
            recent.append(x_0)
            yield chunk, x_0

    def _switched(self, memory: Memory, recent: Float[Tensor, "B F C H W"], text: Tensor, switch: Switch, keep_sink: bool) -> Memory:
        if switch == "keep":
            return memory
        if switch == "flush":
            return memory.flushed(FLUSH_FRAMES)
        last, held = memory.frame_count, len(memory.frame_indices()["sink"]) if keep_sink else 0
        first = max(last - recent.shape[1], held)  # those in the sink are not passed again
        memory = memory.restarted(first, keep_sink)
        while first < last:
            until = min(last, first + self.recipe.chunk - first % self.recipe.chunk)  # the sink may end within a chunk
            part = recent[:, recent.shape[1] - last + first :][:, : until - first]
            memory, first = self.denoiser.remember(part, text, memory), until
        return memory

    def _encoded(self, clip: np.ndarray) -> Float[Tensor, "B F C H W"]:
        pieces = torch.from_numpy(np.ascontiguousarray(clip))[None].split(64, dim=1)
        return torch.cat(list(self.codec.encode_stream(pieces)), dim=1)

    def _decoded(self, made: Iterator[tuple[Chunk, Tensor]], plan: RequestPlan, clip: np.ndarray | None) -> Iterator[Chunk]:
        """Frames for every chunk; the codec's stream gives one piece for each that it is handed."""
        waiting: deque[Chunk] = deque()

        def latents() -> Iterator[Tensor]:
            for chunk, x_0 in made:
                waiting.append(chunk)
                yield x_0

        shown, left = 0, plan.frames
        for video in self.codec.decode_stream(latents()):
            chunk, frames = waiting.popleft(), video[0].numpy()
            if chunk.real and clip is not None:
                frames, shown = clip[shown : shown + len(frames)], shown + len(frames)
            else:
                frames, left = frames[:left], left - len(frames[:left])
            yield replace(chunk, frames=frames)


def promoted_indices(memory: Memory) -> tuple[int, ...]:
    """Latent frames in the slow part by promotion, of the first layer where layers differ."""
    first = memory.layer_memory(0) if isinstance(memory, LayerMemories) else memory
    return tuple(frame.index for frame in first.promoted_frames)
