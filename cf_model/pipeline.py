"""A trained student as a pipeline: a prompt in, frames out, for any length."""

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
from cf_model.codec.light_decoder import LightCodec, load_light_decoder
from cf_model.text.encoder import TextEncoder

from . import folder
from .ahead import iterate_ahead
from .folder import Recipe
from .model.denoiser import Attention, Compute, Denoiser, Precision
from .model.flow import BatchGenerator
from .model.memory import Memory, MemorySpec, empty_memory
from .model.precision import check_fp8, check_onednn
from .model.rollout import denoise_chunk
from .request import Prompts, RequestPlan, Switch, plan_request

FLUSH_FRAMES = 2  # newest latent frames that Infinity-RoPE's flush leaves beside the sink


@dataclass(frozen=True, eq=False)
class Chunk:
    """Chunk of a video as it comes, and the memory that it was made with."""

    first: int  # latent frame, counted from the beginning of the clip that is continued
    latents: int
    frames: UInt8[np.ndarray, "V Y X 3"]
    context: dict[str, list[int]]  # latent frames in sink, slow and fast; this chunk's own are not among them
    promoted: tuple[int, ...]  # frames that have entered the slow part since the chunk before
    similarity: float | None  # eq. 7, of the newest remembered chunk to the chunk before it: the mean over layers
    prompt: str
    real: bool  # a chunk of the clip that is continued


class Options(TypedDict, total=False):
    """Keywords of `ContextForcingPipeline.chunks`, which explains them."""

    seconds: float
    seed: int
    switch: Switch
    keep_sink: bool
    continue_from: UInt8[np.ndarray, "V0 Y X 3"] | None


class Fast(TypedDict, total=False):
    """Ways to be faster, all off unless they are named; docs/speed.md says what each costs and gains."""

    compiled: bool  # passes by torch.compile
    graphs: bool  # passes as CUDA graphs
    merged: bool  # a chunk's clean pass and the next chunk's first step in one
    onednn: bool  # products of the blocks by oneDNN, in float32 on a CPU; differs by rounding
    fp8: bool  # products of the blocks in 8 bits, by torchao; changes the video
    ahead: bool  # a chunk is decoded while the next one is generated
    light_decoder: str | Path | None  # TAEHV's weights, which decode in place of the codec; changes the video


class ContextForcingPipeline:
    """Pipeline in the manner of diffusers, with the paper's loop: chunk after chunk with a bounded memory (alg. 1).

        pipe = ContextForcingPipeline.from_pretrained("out").to("cuda")
        video = pipe("a red fox in the snow", seconds=60, seed=0)  # uint8 [V, Y, X, 3]
        for frame in pipe.stream("a red fox in the snow", seconds=600): ...

    The same seed gives the same frames on the same machine. Memory use does not grow with the video. With absolute
    positions a video that is longer than the RoPE table is refused.
    """

    decode_device: torch.device | None = None  # where the codec decodes; None: where the transformer is
    decode_ahead = False  # whether a chunk is decoded while the next one is generated, in a stream of its own on a GPU

    def __init__(self, denoiser: Denoiser, codec: Codec, text: TextEncoder, recipe: Recipe) -> None:
        config = denoiser.transformer.config
        check_memory(recipe.memory, config.rope_max_seq_len)
        for name, ours, key, theirs in (
            ("codec", codec.channels, "in_channels", config.in_channels),
            ("text encoder", text.channels, "text_dim", config.text_dim),
        ):
            if ours != theirs:
                raise ValueError(f"the {name} has {ours} channels, but the transformer's {key} is {theirs}; use what it was trained with")
        self.denoiser, self.codec, self.text, self.recipe = denoiser.eval(), codec, text, recipe
        self.device, self._is_fp8 = torch.device("cpu"), False

    @classmethod
    def from_pretrained(
        cls, path: str | Path, attention: Attention = "native", dtype: Precision = "float32", **fast: Unpack[Fast]
    ) -> ContextForcingPipeline:
        """Load a folder that `save_pretrained` or `cf export --to diffusers` wrote; nothing is ever downloaded. `fast`: see `Fast`."""
        settings: dict[str, bool] = {"compiled": False, **{name: bool(fast.get(name)) for name in ("compiled", "graphs", "merged")}}
        light = fast.get("light_decoder")
        if fast.get("fp8"):
            check_fp8(dtype)
        if fast.get("onednn"):
            check_onednn(dtype)
        decoder = None if light is None else load_light_decoder(Path(light))
        pipe = cls(*folder.load_folder(Path(path), Compute(attention, dtype, checkpointing=False, **settings)))
        if decoder is not None:
            pipe.codec = LightCodec(pipe.codec, decoder)
        if fast.get("onednn"):
            pipe.denoiser.multiply_by_onednn()
        pipe.decode_ahead, pipe._is_fp8 = bool(fast.get("ahead")), bool(fast.get("fp8"))
        return pipe

    def change_memory(self, memory: MemorySpec) -> None:
        """Generate with another memory from now on."""
        check_memory(memory, self.denoiser.transformer.config.rope_max_seq_len)
        self.recipe = replace(self.recipe, memory=memory)

    def save_pretrained(self, path: str | Path) -> None:
        """Write a new folder in diffusers' layout, which appears under its name when it is complete."""
        codec = self.codec.codec if isinstance(self.codec, LightCodec) else self.codec
        folder.save_folder(Path(path), self.denoiser, codec, self.text, self.recipe)

    def to(self, device: str | torch.device, decode_device: str | torch.device | None = None) -> ContextForcingPipeline:
        """Move transformer and text encoder to a device, the codec there too or to a device of its own, and return the pipeline."""
        self.device = torch.device(device)
        self.decode_device = None if decode_device is None else torch.device(decode_device)
        for part in (self.denoiser, self.text):
            part.to(self.device)
        self.codec.to(self.decode_device or self.device)
        if self._is_fp8:
            self.denoiser.narrow_to_fp8()
        return self

    def __call__(self, prompt: Prompts, **options: Unpack[Options]) -> UInt8[np.ndarray, "V Y X 3"]:
        """Make `seconds` of new video, exact to the frame; prompt and options are those of `chunks`."""
        return np.concatenate([chunk.frames for chunk in self.chunks(prompt, **options) if not chunk.real])

    def stream(self, prompt: Prompts, **options: Unpack[Options]) -> Iterator[UInt8[np.ndarray, "Y X 3"]]:
        """Yield the frames of new video, each as soon as its chunk is made."""
        chunks = self.chunks(prompt, **options)
        return (frame for chunk in chunks if not chunk.real for frame in chunk.frames)

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
        """Yield the chunks of round(seconds * fps) frames of new video, of which the last is cut.

        `prompt` is one text, or several with the seconds of new video from which on they are in force: (0, first),
        (12.5, second), … A chunk is made with the prompt in force at its first frame. At a change of prompt `switch` says
        what becomes of the memory: "recache" empties it and passes the newest frames again with the new prompt, as many
        chunks as it holds (LongLive; `keep_sink` is its global_sink), "flush" leaves the sink and the newest two latent
        frames (Infinity-RoPE), "keep" changes nothing.

        `continue_from` is a clip that the video goes on from: its end, in complete chunks, is remembered first, and its
        chunks are yielded first, unchanged and marked `real`.
        """
        positions = self.denoiser.transformer.config.rope_max_seq_len
        plan = plan_request(self.recipe, self.text, positions, prompt, seconds, seed, switch, continue_from)
        text = {at: self.text.encode([words]).to(self.device) for at, words in plan.prompts.items()}
        clip = None if continue_from is None else continue_from[len(continue_from) - plan.real :]
        return self._decode_chunks(self._make_latents(plan, text, clip, seed, switch, keep_sink), plan, clip)

    def _make_latents(
        self, plan: RequestPlan, text: dict[int, Tensor], clip: np.ndarray | None, seed: int, switch: Switch, keep_sink: bool
    ) -> Iterator[tuple[Chunk, Float[Tensor, "B F C H W"]]]:
        """Yield the latents of the clip's chunks and then of new chunks, each with a Chunk that has no frames yet."""
        recipe, rng = self.recipe, BatchGenerator([(seed,)], self.device)
        sigmas, space = recipe.flow.shift_levels(recipe.levels), self.codec.space
        shape = self.codec.channels, recipe.height // space, recipe.width // space
        memory, now = empty_memory(recipe.memory), text[0]
        promoted: tuple[int, ...] = ()
        recent: deque[Tensor] = deque(maxlen=max(1, recipe.memory.size // recipe.chunk))  # chunks that a recache passes again
        real = self._encode_clip(clip).split(recipe.chunk, dim=1) if clip is not None else ()
        merged = self.denoiser.compute.merged and recipe.memory.timing == "clean"
        finished: Tensor | None = None  # chunk that the next chunk's first pass is to remember
        for number in range(-len(real), plan.chunks):
            if number > 0 and number in text:
                if finished is not None:
                    memory, finished = self.denoiser.remember(finished, now, memory), None
                now = text[number]
                memory = self._switch_prompt(memory, torch.cat(list(recent), dim=1), now, switch, keep_sink)
            # alg. 1, lines 9 to 28: denoise a chunk that sees the memory, then remember it by a clean pass
            seen = memory
            with torch.no_grad():
                if number < 0:
                    x_0 = real[number]
                else:
                    x_0, (_, last), memory = denoise_chunk(self.denoiser, now, shape, sigmas, recipe.chunk, memory, rng, finished)
                    seen = seen if finished is None else last
                before, promoted = promoted, tuple(seen.list_promoted())
                at = max(key for key in plan.prompts if key <= max(number, 0))
                chunk = Chunk(
                    first=(number + len(real)) * recipe.chunk,
                    latents=recipe.chunk,
                    frames=np.zeros((0, recipe.height, recipe.width, 3), np.uint8),
                    context=seen.frame_indices(),
                    promoted=tuple(index for index in promoted if index not in before),
                    similarity=None if seen.similarity is None else float(seen.similarity.mean()),
                    prompt=plan.prompts[at],
                    real=number < 0,
                )
                if merged and number >= 0:
                    finished = x_0
                else:
                    memory, finished = self.denoiser.remember(x_0, now, memory), None
            recent.append(x_0)
            yield chunk, x_0

    def _switch_prompt(self, memory: Memory, recent: Float[Tensor, "B F C H W"], text: Tensor, switch: Switch, keep_sink: bool) -> Memory:
        """Return the memory after a change of prompt; `recent` are the newest latents, which a recache passes again."""
        if switch == "keep":
            return memory
        if switch == "flush":
            return memory.flushed(FLUSH_FRAMES)
        last, sink = memory.frame_count, len(memory.sink) if keep_sink else 0
        first = max(last - recent.shape[1], sink)  # frames in the sink are not passed again
        memory = memory.restarted(first, keep_sink)
        while first < last:
            until = min(last, first + self.recipe.chunk - first % self.recipe.chunk)  # the sink may end within a chunk
            part = recent[:, recent.shape[1] - last + first :][:, : until - first]
            memory, first = self.denoiser.remember(part, text, memory), until
        return memory

    def _encode_clip(self, clip: np.ndarray) -> Float[Tensor, "B F C H W"]:
        """Encode a clip [V, Y, X, 3] piece by piece to latents [1, F, C, H, W]."""
        pieces = torch.from_numpy(np.ascontiguousarray(clip))[None].split(64, dim=1)
        return torch.cat(list(self.codec.encode_stream(pieces)), dim=1)

    def _decode_chunks(self, made: Iterator[tuple[Chunk, Tensor]], plan: RequestPlan, clip: np.ndarray | None) -> Iterator[Chunk]:
        """Yield every chunk with its frames; the codec's stream gives a piece of video for each piece of latents."""
        waiting: deque[Chunk] = deque()
        device = self.decode_device or self.device
        # On a GPU the decoder's kernels wait in a stream of their own, beside those of the next chunk.
        stream = torch.cuda.Stream(device) if self.decode_ahead and device.type == "cuda" else None

        def latents() -> Iterator[Tensor]:
            marked = map(mark_end, made)
            for chunk, x_0, end in iterate_ahead(marked) if self.decode_ahead else marked:
                waiting.append(chunk)
                if stream is not None and end is not None:
                    stream.wait_event(end)
                    x_0.record_stream(stream)
                yield x_0.to(device)

        clip_frames, left = 0, plan.frames
        pieces = iter(self.codec.decode_stream(latents()))
        while True:
            with torch.cuda.stream(stream):  # does nothing where there is none
                video = next(pieces, None)
            if video is None:
                return
            chunk, frames = waiting.popleft(), video[0].numpy()
            if chunk.real and clip is not None:
                frames, clip_frames = clip[clip_frames : clip_frames + len(frames)], clip_frames + len(frames)
            else:
                frames, left = frames[:left], left - len(frames[:left])
            yield replace(chunk, frames=frames)


def check_memory(memory: MemorySpec, positions: int) -> None:
    """Raise ValueError for a memory of more frames than the RoPE table has positions."""
    if memory.size > positions:
        problem = f"memory sink + slow + fast is {memory.size}"
        raise ValueError(f"{problem}, but the RoPE table has {positions} positions; hold fewer frames")


def mark_end(made: tuple[Chunk, Tensor]) -> tuple[Chunk, Tensor, torch.cuda.Event | None]:
    """Return a chunk, its latents and on a GPU the event of their end, which a stream that reads them must wait for."""
    chunk, latents = made
    if latents.device.type != "cuda":
        return chunk, latents, None
    return chunk, latents, torch.cuda.current_stream(latents.device).record_event()
