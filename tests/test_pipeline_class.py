"""ContextForcingPipeline: what it makes, holds and refuses."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from cf_model.ahead import iterate_ahead
from cf_model.codec.interface import video_frames
from cf_model.model.flow import BatchGenerator
from cf_model.model.memory import empty_memory
from cf_model.model.rollout import stream
from cf_model.pipeline import Chunk, ContextForcingPipeline
from cf_model.request import Switch, plan_request
from tests.folders import SIZE, pipeline
from tests.model.test_light_decoder import save_random
from tests.model.test_memory import TIMELINE
from tests.small import SHAPE

WORDS = "a red disc over hills"


@pytest.fixture(scope="module")
def pipe() -> ContextForcingPipeline:
    return pipeline()


def clip(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, SIZE, SIZE, 3), np.uint8)


def held(chunk: Chunk) -> tuple[list[int], list[int], list[int]]:
    return chunk.context["sink"], chunk.context["slow"], chunk.context["fast"]


def latents(pipe: ContextForcingPipeline, chunks: int, memory: object = None) -> torch.Tensor:
    """The same video by the rollout that the stages use."""
    recipe, rng = pipe.recipe, BatchGenerator([(5,)])
    start = empty_memory(recipe.memory) if memory is None else memory
    text = pipe.text.encode([WORDS])
    made = stream(pipe.denoiser, text, SHAPE, sigmas=recipe.flow.shift_levels(recipe.levels), chunk=recipe.chunk, memory=start, rng=rng)  # type: ignore[arg-type]
    return torch.cat(list(islice(made, chunks)), dim=1)


# ------------------------------------------------------------------------------------------------------- what it makes


def test_a_video_is_the_rollout_of_the_stages_decoded(pipe: ContextForcingPipeline) -> None:
    made = pipe(WORDS, seconds=video_frames(15) / 16, seed=5)
    assert (made == pipe.codec.decode(latents(pipe, 5))[0].numpy()).all()


def test_a_stream_gives_the_frames_of_a_call_and_a_shorter_video_is_the_beginning_of_a_longer(pipe: ContextForcingPipeline) -> None:
    made = pipe(WORDS, seconds=3, seed=1)
    assert made.shape == (48, SIZE, SIZE, 3) and made.dtype == np.uint8
    assert (np.stack(list(pipe.stream(WORDS, seconds=3, seed=1))) == made).all()
    for seconds, frames in ((1 / 16, 1), (0.5, 8), (0.57, 9), (0.6, 10), (2.05, 33)):
        assert (pipe(WORDS, seconds=seconds, seed=1) == made[:frames]).all()
    assert (pipe(WORDS, seconds=3, seed=2) != made).any() and (pipe("a blue disc", seconds=3, seed=1) != made).any()


def test_frames_come_as_their_chunk_is_made(pipe: ContextForcingPipeline) -> None:
    """The second chunk is not begun before the first one's frames are handed out."""
    passes = []
    hook = pipe.denoiser.transformer.register_forward_hook(lambda *_: passes.append(1))
    try:
        frames = pipe.stream(WORDS, seconds=600)
        assert not passes
        for _ in range(video_frames(3)):
            next(frames)
        assert len(passes) == 2 + 1  # levels, and the clean pass
        next(frames)
        assert len(passes) == 2 * (2 + 1)
    finally:
        hook.remove()


@pytest.mark.parametrize("way", ["ahead", "merged"])
def test_a_faster_way_makes_the_same_video(pipe: ContextForcingPipeline, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded while the next chunk is made, or remembered by the next chunk's first pass: frames and what is said of them."""
    prompt, compute = [(0.0, WORDS), (6.0, "a blue disc")], pipe.denoiser.compute

    def make() -> list[Chunk]:
        return list(pipe.chunks(prompt, seconds=9, seed=1))

    plain = make()
    monkeypatch.setattr(pipe, "decode_ahead", way == "ahead")
    monkeypatch.setattr(pipe.denoiser, "compute", replace(compute, merged=way == "merged"))
    for chunk, other in zip(plain, make(), strict=True):
        assert np.abs(chunk.frames.astype(int) - other.frames.astype(int)).max() <= (way == "merged")  # rounding
        names = ("first", "context", "promoted", "prompt", "real")
        assert [getattr(chunk, name) for name in names] == [getattr(other, name) for name in names]
        assert chunk.similarity == (other.similarity and pytest.approx(other.similarity, abs=1e-5))


def test_a_light_decoder_takes_the_codecs_place(pipe: ContextForcingPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "student")
    light = ContextForcingPipeline.from_pretrained(tmp_path / "student", light_decoder=save_random(tmp_path))
    made, plain = light(WORDS, seconds=1, seed=1), pipe(WORDS, seconds=1, seed=1)
    assert made.shape == plain.shape and (made != plain).any()
    light.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/codec/codec.safetensors").read_bytes() == (tmp_path / "student/codec/codec.safetensors").read_bytes()


def test_a_thread_that_runs_ahead_stops_with_its_reader_and_hands_errors_on() -> None:
    made: list[int] = []

    def count() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            if number == 7:
                raise ValueError("seven")
            yield number

    numbers = iterate_ahead(count())
    assert [next(numbers), next(numbers)] == [0, 1]
    numbers.close()
    assert len(made) <= 4 and not any(thread.name == "chunks" for thread in threading.enumerate())
    made.clear()
    with pytest.raises(ValueError, match="seven"):
        list(iterate_ahead(count()))


def test_the_memory_follows_the_timeline(pipe: ContextForcingPipeline) -> None:
    chunks = list(pipe.chunks(WORDS, seconds=9.5))
    assert {n: held(chunk) for n, chunk in enumerate(chunks)} == TIMELINE
    assert {n: chunk.promoted for n, chunk in enumerate(chunks) if chunk.promoted} == {4: (6,), 6: (12,), 8: (18,), 10: (24,), 12: (30,)}
    assert [chunk.similarity is None for chunk in chunks[:3]] == [True, True, False]


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_what_is_held_does_not_grow_and_promotions_go_on(scope: str) -> None:
    pipe = pipeline(scope=scope)
    size, counts, late = pipe.recipe.memory.size, [], 0
    gc.freeze()  # what is there before is not looked through: neither libraries nor weights
    for n, chunk in enumerate(pipe.chunks(WORDS, seconds=48)):
        assert sum(len(part) for part in chunk.context.values()) <= size - 3
        late += n >= 45 and bool(chunk.promoted)
        if n % 10 == 9:
            gc.collect()
            counts.append(sum(item.numel() for item in gc.get_objects() if type(item) is torch.Tensor))
    gc.unfreeze()
    assert len(chunk.context["slow"]) == 12 and late >= 9
    assert len(counts) == 6 and len(set(counts[3:])) == 1, counts


# --------------------------------------------------------------------------------------------- prompts, and real clips


@pytest.mark.parametrize("switch", ["recache", "flush", "keep"])
def test_a_new_prompt_changes_what_comes_after_it_and_nothing_before(pipe: ContextForcingPipeline, switch: str) -> None:
    """Chunk 12 is the first that begins at 8.2 s or later; a recache passes 15 to 35 again, of which 18, 24 and 30 are kept."""
    one = list(pipe.chunks(WORDS, seconds=9.5))
    two = list(pipe.chunks([(0, WORDS), (8.2, "fog")], seconds=9.5, switch=switch))  # type: ignore[arg-type]
    assert [chunk.prompt for chunk in two] == [WORDS] * 12 + ["fog"]
    assert [(a.frames == b.frames).all() for a, b in zip(one, two, strict=True)] == [True] * 12 + [False]
    after = {"recache": ([0, 1, 2], [18, 24, 30], [33, 34, 35]), "flush": ([0, 1, 2], [], [34, 35]), "keep": TIMELINE[12]}
    assert held(two[12]) == after[switch]
    if switch == "keep":
        assert {n: held(chunk) for n, chunk in enumerate(two)} == TIMELINE


def test_after_a_recache_nothing_is_left_of_the_old_prompt_but_the_sink(pipe: ContextForcingPipeline) -> None:
    video, text = latents(pipe, 9), {words: pipe.text.encode([words]) for words in ("one", "two", "new")}
    before = [pipe.denoiser.remember_clip(video, text[words], pipe.recipe.memory, chunk=3) for words in ("one", "two")]
    for keep_sink in (False, True):
        after = [pipe._switch_prompt(memory, video[:, -21:], text["new"], "recache", keep_sink) for memory in before]
        assert [frame.index for frame in after[0].frames] == [frame.index for frame in after[1].frames]  # type: ignore[union-attr]
        for one, other in zip(after[0].frames, after[1].frames, strict=True):  # type: ignore[union-attr]
            equal = all(torch.equal(a, b) for a, b in zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True))
            # the new frames have seen the kept sink; their first layer has not
            first = torch.equal(one.keys[0], other.keys[0])
            assert equal if not keep_sink else (first or one.index < 3)
    assert after[0].sink == before[0].sink  # type: ignore[union-attr]


def test_a_recache_soon_after_the_start_keeps_frames_once(pipe: ContextForcingPipeline) -> None:
    chunks = list(pipe.chunks([(0, WORDS), (1.4, "fog")], seconds=3, switch="recache"))
    [at] = [n for n, (a, b) in enumerate(pairwise(chunks)) if a.prompt != b.prompt]
    assert held(chunks[at + 1]) == ([0, 1, 2], [], [6, 7, 8])
    fresh = list(pipe.chunks([(0, WORDS), (1.4, "fog")], seconds=3, switch="recache", keep_sink=False))
    assert held(fresh[at + 1]) == ([0, 1, 2], [], [6, 7, 8]) and (fresh[at + 1].frames != chunks[at + 1].frames).any()


def test_a_clip_is_remembered_and_comes_first_as_it_is(pipe: ContextForcingPipeline) -> None:
    """26 frames: the last 21 are two chunks, 1 + 20."""
    real = clip(26)
    chunks = list(pipe.chunks(WORDS, seconds=2, seed=5, continue_from=real))
    assert [chunk.real for chunk in chunks] == [True] * 2 + [False] * 3
    assert (np.concatenate([chunk.frames for chunk in chunks if chunk.real]) == real[5:]).all()
    assert {n: held(chunk) for n, chunk in enumerate(chunks)} == {n: TIMELINE[n] for n in range(5)}
    encoded = pipe.codec.encode(torch.from_numpy(real[5:])[None])
    memory = pipe.denoiser.remember_clip(encoded, pipe.text.encode([WORDS]), pipe.recipe.memory, chunk=3)
    whole = pipe.codec.decode(torch.cat([encoded, latents(pipe, 3, memory)], dim=1))[0].numpy()
    made = pipe(WORDS, seconds=2, seed=5, continue_from=real)
    assert made.shape[0] == 32 and (made == whole[21:][:32]).all()
    assert (pipe(WORDS, seconds=2, seed=5, continue_from=clip(26, seed=1)) != made).any()


# --------------------------------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"seconds": 0}, "seconds is 0, which is no length of a video; use 0.0625"),
        ({"seconds": -3}, "seconds is -3"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"seconds": float("inf")}, "seconds is inf"),
        ({"seconds": 0.01}, "seconds is 0.01"),
        ({"seed": -1}, "seed is -1; use a whole number from 0"),
        ({"prompt": "  "}, "a prompt is empty"),
        ({"prompt": "word " * 5000}, r"the prompt 'word .*…' has 5000 words, which are 5000 tokens, but the text encoder reads 16"),
        ({"prompt": []}, "the first prompt's time is missing"),
        ({"prompt": [(1.0, "a")]}, "the first prompt's time is 1 s; the video begins with it, so give 0"),
        ({"prompt": [(0, "a"), (3, "b"), (2, "c")]}, "times 3 and 2 s do not rise"),
        ({"prompt": [(0, "a"), (3, "b"), (3, "c")]}, "times 3 and 3 s do not rise"),
        ({"prompt": [(0, "a"), (9, "b")]}, "time is 9 s, but the last chunk of 5 s begins at 4.3125 s"),
        ({"prompt": [(0, "a"), (float("nan"), "b")]}, "do not rise"),
        ({"prompt": [(0, "a"), (3.1, "b"), (3.2, "c")]}, "two prompts' times lie in one chunk.*put them 0.75 s or more apart"),
        ({"continue_from": clip(8)}, "continue_from has 8 frames, but a chunk is 9; use a longer clip"),
        ({"continue_from": np.zeros((30, 48, 64, 3), np.uint8)}, r"continue_from is uint8 \[30, 48, 64, 3\], but frames .* \[32, 32, 3\]"),
    ],
)
def test_what_can_not_be_made_is_refused_before_anything_runs(pipe: ContextForcingPipeline, asked: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        pipe.stream(**({"prompt": WORDS, "seconds": 5} | asked))
    assert "\n" not in str(refused.value)


def test_an_unknown_switch_is_refused(pipe: ContextForcingPipeline) -> None:
    with pytest.raises(ValueError, match="switch is 'forget'; use recache, flush, keep"):
        plan_request(pipe.recipe, pipe.text, 256, WORDS, 5, 0, "forget", None)


def test_absolute_positions_end_with_their_table() -> None:
    """256 positions: 1021 frames, 63.8 s."""
    pipe = pipeline(positions="absolute")
    assert (next(pipe.stream(WORDS, seconds=63)) == next(pipeline().stream(WORDS, seconds=63))).all()
    with pytest.raises(ValueError, match="table ends at latent frame 256, and 70 s of video need 282; use at most 63 s in all"):
        pipe.stream(WORDS, seconds=70)
    with pytest.raises(ValueError, match="need 258"):
        pipe.stream(WORDS, seconds=60, continue_from=clip(69))


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("keep_sink", [True, False])
@pytest.mark.parametrize("switch", ["recache", "flush", "keep"])
@pytest.mark.parametrize("sink", [1, 3])
def test_a_prompt_may_change_at_any_chunk(switch: Switch, keep_sink: bool, scope: str, sink: int) -> None:
    """At chunk 1, too, when all that was made is in the sink; and nothing that is recached is lost or passed twice."""
    pipe = pipeline(scope=scope, sink=sink)
    for at in (0.5, 1.2):
        chunks = list(pipe.chunks([(0, WORDS), (at, "fog")], seconds=2, seed=1, switch=switch, keep_sink=keep_sink))
        changed = next(i for i, chunk in enumerate(chunks) if chunk.prompt == "fog")
        found = sorted(index for part in held(chunks[changed]) for index in part)
        assert len(found) == len(set(found))
        if switch == "recache":
            made = list(range(3 * changed))
            assert found == sorted({*made[:sink], *made[-3:]})


def test_a_recache_passes_the_frames_again_with_the_new_prompt(pipe: ContextForcingPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, inner = [], type(pipe.denoiser).remember

    def listen(model: object, x_0: torch.Tensor, text: torch.Tensor, *rest: object) -> object:
        asked.append(text)
        return inner(model, x_0, text, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(type(pipe.denoiser), "remember", listen)
    list(pipe.chunks([(0, WORDS), (1.2, "fog")], seconds=1.8, seed=1))
    old, new = (pipe.text.encode([words]) for words in (WORDS, "fog"))
    said = ["old" if torch.equal(text, old) else "new" if torch.equal(text, new) else "?" for text in asked]
    assert said == ["old", "old", "new", "new"], "two chunks, the one that is not in the sink once more, a third"
