"""Every video of a batch decides for itself (eq. 7), as if it were generated alone, and no decision is read by the host."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from cf_model.model.key_values import KeyValues
from cf_model.model.memory import Memory, empty_memory
from cf_model.model.memory_state import dump_memory, restore_memory
from cf_model.model.rollout import denoise_chunk, rollout, stream
from cf_model.model.slow_part import SlowPart
from tests.small import FLOW, SHAPE, denoiser, normal, rng, rolling, spec

READINGS = {
    "paper": {},
    "every chunk": {"interval": 1, "slow": 3},
    "small": {"slow": 2, "interval": 1},
    "whole chunks": {"keep": "all", "slow": 4, "interval": 1},
    "packed": {"positions": "packed", "slow": 3, "interval": 1},
    "absolute": {"positions": "absolute", "slow": 3, "interval": 1},
    "by layer": {"scope": "layer", "slow": 3, "interval": 1},
    "at once": {"when": "enqueue", "slow": 3, "interval": 1},
    "released": {"interval": 1, "begin": 2, "when": "enqueue", "timing": "first_call", "fill": "early_raw", "scope": "layer", "slow": 5},
    "released, absolute": {"interval": 1, "when": "enqueue", "fill": "early_raw", "slow": 5, "positions": "absolute"},
    "no slow part": {"slow": 0, "promote": "none"},
    "fast context": {"commit": "fast", "slow": 3, "interval": 1},
    "centred": {"similarity": "centred", "slow": 3, "interval": 1, "tau": 0.1},
    "centred, released": {"similarity": "centred", "slow": 5, "interval": 1, "tau": 0.1, "scope": "layer"}
    | {"when": "enqueue", "timing": "first_call", "fill": "early_raw"},
}
KEY = torch.randn(64, 2, 8, generator=rng(5))  # a key for each chunk and layer: neighbours are nearly orthogonal


def frames(number: int, videos: list[list[bool]], layers: int = 2) -> tuple[KeyValues, ...]:
    """A chunk of 3 frames of several videos: with `True` its keys repeat the chunk before; values tell video and frame."""
    keys = []
    for layer in range(layers):
        rows = []
        for alike in videos:
            last = max(n for n in range(number + 1) if n == 0 or not alike[n])  # the chunk whose key is repeated
            rows.append(KEY[last, layer].view(1, 1, 8))
        keys.append(torch.stack(rows))  # [B, S, N, D]
    value = [torch.tensor([[100.0 * v + 3 * number + f] for v in range(len(videos))]).view(-1, 1, 1, 1) for f in range(3)]
    return tuple(KeyValues(3 * number + f, tuple(keys), (value[f].expand(-1, -1, -1, 8),) * layers) for f in range(3))


def remembering(videos: list[list[bool]], changes: dict[str, object]) -> Memory:
    memory = empty_memory(spec(**changes))
    for number in range(len(videos[0])):
        chunk = frames(number, videos)
        memory = memory.offer(chunk).remember(chunk)
    return memory


def list_slow(alike: list[bool], changes: dict[str, object]) -> list[int]:
    """The policy of eq. 7 in plain words, for one video: what its slow part holds at the end."""
    plan = spec(**changes)
    slow: list[int] = []
    for number, same in enumerate(alike):
        tested = number >= plan.begin and number % plan.interval == 0
        first = range(3 * number, 3 * number + (3 if plan.keep == "all" else 1))
        # promoted at once, or when the frame has left the fast part, in which the next chunk counts
        for frame in first if tested and not same else ():
            if plan.when == "enqueue" or frame < 3 * len(alike) - (plan.fast - 3):
                slow = [*slow, frame][-plan.slow :]
    return slow


@pytest.mark.parametrize("reading", ["paper", "every chunk", "small", "whole chunks", "at once", "by layer"])
@settings(deadline=None, max_examples=12)
@given(videos=st.lists(st.lists(st.booleans(), min_size=14, max_size=14), min_size=1, max_size=3))
def test_each_video_holds_what_its_own_keys_promote(reading, videos):
    memory = remembering(videos, READINGS[reading])
    for video, alike in enumerate(videos):
        expected = list_slow(alike, READINGS[reading])
        assert memory.frame_indices(video)["slow"] == expected
        # the values in those places are that video's, of those frames
        if memory.slow.places:
            values = memory.slow.read(layer=1)[1][video, : len(expected), 0, 0, 0]
            assert values.tolist() == [100 * video + frame for frame in expected]


@pytest.mark.parametrize("reading", READINGS)
def test_a_video_in_a_batch_is_remembered_as_alone(reading):
    draw = random.Random(reading)
    videos = [[draw.random() < 0.5 for _ in range(24)] for _ in range(3)]
    memory = remembering(videos, READINGS[reading])
    for video, alike in enumerate(videos):
        alone = remembering([alike], READINGS[reading])
        for layer in range(2):
            assert memory.frame_indices(video, layer) == alone.frame_indices(0, layer)
            mine, own = memory.mask_empty(layer), alone.mask_empty(layer)
            for both, one, first in zip(memory.past(layer), alone.past(layer), (0, 100 * video), strict=True):
                both, one = torch.cat(both, dim=1)[video] - first, torch.cat(one, dim=1)[0]
                assert torch.equal(both if mine is None else both[mine[video]], one if own is None else one[own[0]])


def test_the_list_of_candidates_stays_short():
    part = SlowPart(3)
    for number in range(50):
        news = torch.tensor([[number % 7 == 0], [number % 2 == 0]])
        frame = KeyValues(number, (torch.full((2, 1, 1, 1), float(number)),), (torch.zeros(2, 1, 1, 1),))
        before, part = part, part.promote((frame,), news)
        assert len(part.candidates) < 8 and len(before.candidates) < 8
    assert part.list_frames(0, 0) == [35, 42, 49] and part.list_frames(1, 0) == [44, 46, 48]
    assert part.read(0)[0].flatten(1).tolist() == [[35, 42, 49], [44, 46, 48]]


def test_centred_keys_are_compared_without_what_the_video_has_shown_on_average():
    """Eq. 7 in plain words; keys that all share a large part are nearly equal, and only the rest tells chunks apart."""
    keys = 30 * KEY[60] + KEY[:20].double()  # [chunk, layer, channel]
    keys[7], keys[12] = keys[6], keys[11] + 0.01 * KEY[40]
    layers = range(2)

    def remember(similarity: str, tau: float) -> list[Memory]:
        memories = [empty_memory(spec(similarity=similarity, tau=tau, interval=1))]
        for number, key in enumerate(keys.float()):
            one = tuple(key[layer].view(1, 1, 1, 8) for layer in layers)
            memories.append(memories[-1].remember(tuple(KeyValues(3 * number + f, one, one) for f in range(3))))
        return memories

    memories = remember("centred", tau=0.5)
    for number in range(1, 20):
        mean = keys[:number].mean(dim=0)  # of the chunks before this one
        expected = torch.cosine_similarity(keys[number] - mean, keys[number - 1] - mean, dim=-1)
        got = memories[number + 1].similarity
        assert got is not None and torch.allclose(got[0], expected.float(), atol=1e-3)
        assert bool(memories[number + 1].is_newest_news) is bool(expected.mean() < 0.5)
    kept = memories[-1].list_promoted()
    assert 21 not in kept and 36 not in kept and len(kept) > 5, "a chunk that repeats the one before is no news"
    assert not remember("raw", tau=0.99)[-1].list_promoted(), "with the shared part no chunk is"
    # a memory is a value: going on from an old one, or from its state, is going on as it did
    for old in (memories[10], restore_memory(memories[10].spec, dump_memory(memories[10]))):
        one = tuple(keys[10].float()[layer].view(1, 1, 1, 8) for layer in layers)
        again = old.remember(tuple(KeyValues(30 + f, one, one) for f in range(3)))
        assert torch.equal(again.similarity, memories[11].similarity) and torch.equal(again.video_mean_key, memories[11].video_mean_key)
        assert again.mean_chunks == 11


def row_noise(shape: tuple[int, ...], seeds: list[int]) -> Iterator[torch.Tensor]:
    """Noise whose rows do not depend on the other rows."""
    generators = [rng(seed) for seed in seeds]
    while True:
        yield torch.stack([torch.randn(shape, generator=generator) for generator in generators])


# near the median similarity of this random model, so that videos differ; noisy passes resemble each other less
TAU, TAU_NOISY = 0.83, 0.25
RELEASED_TIMING = {"timing": "first_call", "when": "enqueue", "fill": "early_raw", "scope": "layer"}


@pytest.mark.parametrize("reading", READINGS)
def test_a_video_in_a_batch_is_generated_as_alone(reading):
    model, text = denoiser(), normal(3, 5, 8, seed=3)
    changes = {"tau": TAU_NOISY if "timing" in READINGS[reading] else TAU} | READINGS[reading]

    def generate(rows: list[int]) -> tuple[torch.Tensor, Memory]:
        memory = empty_memory(spec(**changes))
        video, noise = [], row_noise((3, *SHAPE), rows)
        for _ in range(12):
            with torch.no_grad():
                x_0, _, memory = denoise_chunk(model, text[rows], SHAPE, [1.0, 0.6], 3, memory, noise)
                memory = model.remember(x_0, text[rows], memory)
            video.append(x_0)
        return torch.cat(video, dim=1), memory

    together, memory = generate([0, 1, 2])
    for row in range(3):
        alone, own = generate([row])
        assert [own.frame_indices(0, layer) for layer in range(2)] == [memory.frame_indices(row, layer) for layer in range(2)]
        assert float((alone[0] - together[row]).abs().max()) < 1e-5
    if reading != "no slow part":
        assert len({tuple(counts) for counts in memory.promoted_count.tolist()}) > 1, "the videos were to differ"


class ForbidHostReads(TorchDispatchMode):
    """Raise where a tensor's value is asked for: on a GPU that waits until all work before it is done."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default):
            raise AssertionError(f"{function} reads a value")
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("reading", READINGS)
def test_generation_reads_no_value(reading):
    model, text = denoiser(), normal(2, 5, 8, seed=3)
    changes = {"tau": TAU} | READINGS[reading]
    chunks = stream(model, text, SHAPE, sigmas=[1.0, 0.6], chunk=3, memory=empty_memory(spec(**changes)), rng=rng())
    with ForbidHostReads():
        for _ in range(12):
            next(chunks)


@pytest.mark.parametrize("reading", READINGS)
def test_a_kernel_that_takes_no_mask_is_shown_the_filled_places_only(reading):
    """As flash attention, which exists on a GPU only; here the same with the kernel that is there, with and without gradients."""
    model, text, changes = denoiser(), normal(2, 5, 8, seed=3), {"tau": 0.5} | READINGS[reading]
    clips = normal(2, 60, *SHAPE)
    memories = [model.remember_clip(clips[row : row + 1], text[:1], spec(**changes), chunk=3) for row in range(2)]
    both = model.remember_clip(clips, text[:1].expand(2, -1, -1), spec(**changes), chunk=3)
    x, sigma = normal(1, 3, *SHAPE, seed=5), torch.tensor([0.5])
    answers = [model(x, sigma, text[:1], memory) for memory in memories]
    try:
        model.transformer.rope.takes_mask = False
        for memory, masked in zip(memories, answers, strict=True):
            model.transformer.rope.forget_store(memory)
            assert torch.allclose(model(x, sigma, text[:1], memory), masked, atol=1e-5)
            with torch.no_grad():
                assert torch.allclose(model(x, sigma, text[:1], memory), masked, atol=1e-5)
        if reading == "paper":
            with pytest.raises(ValueError, match=r"remember different numbers of frames.* use attention: native or cudnn, or a batch of 1"):
                model(x.expand(2, -1, -1, -1, -1), sigma.expand(2), text, both)
    finally:
        model.transformer.rope.takes_mask = True


@pytest.mark.parametrize(
    ("changes", "plan"),
    [({}, {}), ({}, {"renoise": "own", "exit": "last"}), (RELEASED_TIMING, {})],
    ids=["paper", "noised again", "released"],
)
def test_a_rollout_leaves_no_copies_of_the_memories_that_are_replayed(changes, plan):
    """At Wan's size each would hold gigabytes while the scores are computed."""
    model = denoiser()
    made = rollout(model, normal(1, 5, 8), 30, SHAPE, spec=rolling(**plan), memory=spec(tau=TAU, **changes), flow=FLOW, rng=rng())
    assert len(made.targets) == 3 and not model.transformer.rope._stores


def test_a_chunk_in_the_sink_is_no_news():
    memory = remembering([[False] * 4], {"sink": 6, "interval": 1, "tau": 1.0})
    assert memory.is_newest_news is not None and bool(memory.is_newest_news)
    assert remembering([[False] * 2], {"sink": 6, "interval": 1, "tau": 1.0}).is_newest_news is False
