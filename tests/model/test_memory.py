# Long: one policy, all its readings side by side.
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cf_model.model.key_values import KeyValues, mean_key
from cf_model.model.memory import Memory, empty_memory
from cf_model.model.memory_state import dump_memory, restore_memory
from tests.small import places, queries, rng, spec


def chunk(first: int, alike: bool = False, length: int = 3) -> tuple[KeyValues, ...]:
    """Frames whose keys resemble those of every other `alike` chunk, or nothing."""
    key = torch.ones(1, 2, 1, 8) if alike else torch.randn(1, 2, 1, 8, generator=rng(first))
    return tuple(KeyValues(first + i, (key,), (key,)) for i in range(length))


def after(chunks: int, **changes: object) -> Memory:
    memory = empty_memory(spec(**changes))
    for c in range(chunks):
        memory = memory.remember(chunk(3 * c))
    return memory


def indices(frames: tuple[KeyValues, ...]) -> list[int]:
    return [frame.index for frame in frames]


def slow(memory: Memory, layer: int = 0) -> list[int]:
    return memory.frame_indices(layer=layer)["slow"]


def slow_key(memory: Memory, place: int, layer: int = 0) -> torch.Tensor:
    """The key in one place of the slow part, [B, S, N, D]."""
    return torch.cat(memory.past(layer)[0], dim=1).unflatten(1, (memory.places, -1))[:, len(memory.sink) + place]


def held(memory: Memory, layer: int = 0) -> int:
    """How many frames a pass of the first video attends to."""
    mask = memory.mask_empty(layer)
    return memory.places if mask is None else int(mask[0].sum())


# docs/method.md, "Promotion": what chunk c sees when every tested chunk is news
TIMELINE = {
    0: ([], [], []),
    1: ([0, 1, 2], [], []),
    2: ([0, 1, 2], [], [3, 4, 5]),
    3: ([0, 1, 2], [], [6, 7, 8]),
    4: ([0, 1, 2], [6], [9, 10, 11]),
    5: ([0, 1, 2], [6], [12, 13, 14]),
    6: ([0, 1, 2], [6, 12], [15, 16, 17]),
    7: ([0, 1, 2], [6, 12], [18, 19, 20]),
    8: ([0, 1, 2], [6, 12, 18], [21, 22, 23]),
    9: ([0, 1, 2], [6, 12, 18], [24, 25, 26]),
    10: ([0, 1, 2], [6, 12, 18, 24], [27, 28, 29]),
    11: ([0, 1, 2], [6, 12, 18, 24], [30, 31, 32]),
    12: ([0, 1, 2], [6, 12, 18, 24, 30], [33, 34, 35]),
}
# "released": slow and fast as chunk c is made, after its first noisy pass; every chunk from the second on is news
RELEASED = {
    0: ([], [], []),
    1: ([0, 1, 2], [], []),
    2: ([0, 1, 2], [6, 4, 5], []),
    3: ([0, 1, 2], [6, 9, 5, 6, 7, 8], []),
    4: ([0, 1, 2], [6, 9, 12, 6, 7, 8, 9, 10, 11], []),
    5: ([0, 1, 2], [6, 9, 12, 15, *range(7, 15)], []),
    6: ([0, 1, 2], [6, 9, 12, 15, 18, *range(8, 15)], [15, 16, 17]),
    7: ([0, 1, 2], [6, 9, 12, 15, 18, 21, *range(9, 15)], [18, 19, 20]),
    8: ([0, 1, 2], [*range(6, 25, 3), *range(10, 15)], [21, 22, 23]),
    9: ([0, 1, 2], [*range(6, 28, 3), *range(11, 15)], [24, 25, 26]),
    10: ([0, 1, 2], [*range(6, 31, 3), *range(12, 15)], [27, 28, 29]),
    11: ([0, 1, 2], [*range(6, 34, 3), 13, 14], [30, 31, 32]),
    12: ([0, 1, 2], [*range(6, 37, 3), 14], [33, 34, 35]),
}
AS_RELEASED = {"interval": 1, "begin": 2, "when": "enqueue", "timing": "first_call", "fill": "early_raw", "scope": "layer"}
QUERIES = {  # of the current chunk, after 0, 1, 2, … chunks
    "fixed": [18] * 13,
    "anchored": [0, 3, 6, 9, 12, 15] + [18] * 7,
    "packed": [0, 3, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11],
    "absolute": list(range(0, 39, 3)),
}


@pytest.mark.parametrize("chunks", TIMELINE)
def test_timeline_of_the_paper(chunks):
    memory = after(chunks)
    assert tuple(memory.frame_indices().values()) == TIMELINE[chunks]


def making(number: int, memory: Memory, layers: int = 1) -> tuple[Memory, Memory]:
    """Chunk `number` in four noisy passes and a clean one: the memory that its last noisy pass sees, and the one after."""
    for step in range(4):
        memory = memory.offer(noisy(number, step, layers))
    return memory, memory.remember(noisy(number, 9, layers))


def noisy(number: int, step: int, layers: int) -> tuple[KeyValues, ...]:
    keys = tuple(torch.randn(1, 2, 1, 8, generator=rng(1000 * layer + 10 * number + step)) for layer in range(layers))
    return tuple(KeyValues(3 * number + i, keys, keys) for i in range(3))


def test_timeline_of_the_released_code():
    memory = empty_memory(spec(**AS_RELEASED))
    for c, expected in RELEASED.items():
        during, memory = making(c, memory, layers=2)
        assert tuple(during.frame_indices().values()) == expected
        first = min(3 * c, 18)
        assert queries(during, 3) == [first, first + 1, first + 2]
        # slot = position: sink, slow and fast without a gap, right before the query
        assert places(during, 3) == list(range(first))


def test_every_second_chunk_of_the_released_code():
    memory = empty_memory(spec(**AS_RELEASED | {"interval": 2}))
    for c in range(13):
        during, memory = making(c, memory)
    assert during.frame_indices()["slow"] == [6, 12, 18, 24, 30, 36, *range(9, 15)] and during.frame_indices()["fast"] == [33, 34, 35]


def test_what_was_kept_on_the_first_call_are_that_passs_keys():
    memory = empty_memory(spec(**AS_RELEASED))
    for c in range(3):
        during, memory = making(c, memory)
    assert torch.equal(slow_key(during, 0), noisy(2, 0, 1)[0].keys[0])
    # a first pass like the chunk before it is not kept, a later pass that differs is
    during = memory.offer(noisy(2, 9, 1))
    assert during.promoted_count == memory.promoted_count
    during = during.offer(noisy(3, 1, 1))
    assert during.promoted_count == memory.promoted_count + 1
    assert torch.equal(slow_key(during, 1), noisy(3, 1, 1)[0].keys[0])


def test_layers_decide_for_themselves():
    def chunk(number: int) -> tuple[KeyValues, ...]:
        keys = (torch.ones(1, 2, 1, 8), torch.randn(1, 2, 1, 8, generator=rng(number)))
        return tuple(KeyValues(3 * number + i, keys, keys) for i in range(3))

    alone, together = empty_memory(spec(scope="layer")), empty_memory(spec(tau=0.2))
    for c in range(8):
        alone, together = alone.remember(chunk(c)), together.remember(chunk(c))
    assert slow(alone, 0) == [] and slow(alone, 1) == [6, 12, 18]
    assert held(alone, 0) + 3 == held(alone, 1) and float(alone.similarity[0, 0]) == pytest.approx(1)
    assert torch.equal(slow_key(alone, 0, layer=1), chunk(2)[0].keys[1])
    assert slow(together) == []  # the mean of 1 and about 0 is above 0.2


def test_keep_all_keeps_the_chunk_and_enqueue_keeps_it_twice():
    assert slow(after(6, keep="all")) == [6, 7, 8, 12, 13, 14]
    early = after(5, when="enqueue")  # chunk 4 has just been made
    assert slow(early) == [6, 12] and indices(early.fast) == [12, 13, 14]


def test_uniform_random_and_where_it_begins():
    assert slow(after(8, promote="uniform", interval=1)) == [3, 6, 9, 12, 15, 18]
    assert slow(after(8, promote="uniform", interval=1, begin=3)) == [9, 12, 15, 18]
    drawn = slow(after(60, promote="random", interval=1, slow=99))
    assert drawn == slow(after(60, promote="random", interval=1, slow=99)) and 15 < len(drawn) < 45


def test_the_commit_pass_may_see_the_fast_part_only():
    memory = after(9, commit="fast")
    assert indices(memory.commit_context(3).frames) == indices(memory.fast) and queries(memory.commit_context(3), 3) == [18, 19, 20]
    assert after(9).commit_context(3).frame_indices() == after(9).frame_indices()
    assert indices(after(1, commit="fast").commit_context(3).frames) == [0, 1, 2], "recent frames count, wherever they are"


def test_flushed_and_restarted():
    memory = after(9)
    assert {**memory.flushed(2).frame_indices()} == {"sink": [0, 1, 2], "slow": [], "fast": [25, 26]}
    again = memory.restarted(6, keep_sink=True)
    for c in range(2, 9):
        again = again.remember(chunk(3 * c))
    assert again.frame_count == 27 and indices(again.fast) == [24, 25, 26] and slow(again)[0] >= 12
    assert indices(memory.restarted(6, keep_sink=False).remember(chunk(6)).sink) == [6, 7, 8]


@pytest.mark.parametrize("emptied", ["flush", "recache"])
def test_the_released_memory_goes_on_after_it_was_emptied(emptied):
    """Its free places are for the video's first frames; those that come later belong to the fast part."""
    memory = empty_memory(spec(**AS_RELEASED))
    for c in range(13):
        _, memory = making(c, memory)
    memory = memory.flushed(2) if emptied == "flush" else memory.restarted(39, keep_sink=True)
    for c in range(13, 20):
        during, memory = making(c, memory)
        left = [] if emptied == "recache" else [37, 38]
        assert during.frame_indices()["fast"] == (left if c == 13 else [3 * c - 3, 3 * c - 2, 3 * c - 1])
        assert during.frame_indices()["slow"] == [3 * k for k in range(13, c + 1)]


def test_the_released_memory_keeps_what_it_only_watched():
    """A real clip has no noisy passes: its clean ones are the calls."""
    memory = empty_memory(spec(**AS_RELEASED))
    for c in range(10):
        memory = memory.remember(noisy(c, 9, 1))
    assert memory.frame_indices()["slow"] == [*range(6, 28, 3), *range(11, 15)]
    again = making(10, memory)[1]
    assert again.promoted_count == memory.promoted_count + 1, "and a chunk that was kept on a noisy pass is not kept a second time"


def test_the_log_shows_a_chunk_against_the_chunk_before():
    """Also when later passes are compared with the chunk's own earlier ones."""
    memory = empty_memory(spec(**AS_RELEASED, tau=-1.0))
    for c in range(2):
        _, memory = making(c, memory)
    first = memory.offer(noisy(2, 0, 1))
    last = first.offer(noisy(2, 0, 1)).remember(noisy(2, 0, 1))
    assert torch.equal(last.similarity, first.similarity) and float(first.similarity) < 0.99


def test_the_mean_key_is_of_all_tokens_of_all_frames():
    keys = [torch.randn(2, 4, 2, 3, generator=rng(i)) for i in range(3)]
    frames = tuple(KeyValues(i, (key,), (key,)) for i, key in enumerate(keys))
    expected = torch.stack(keys).mean(dim=(0, 2)).flatten(1)  # [B, N * D]
    assert torch.allclose(mean_key(frames)[:, 0], expected, atol=1e-6)


def test_layers_of_different_occupancy_have_positions_of_their_own():
    memory = empty_memory(spec(scope="layer", positions="packed"))
    for c in range(8):
        keys = (torch.ones(1, 2, 1, 8), torch.randn(1, 2, 1, 8, generator=rng(c)))
        memory = memory.remember(tuple(KeyValues(3 * c + i, keys, keys) for i in range(3)))
    assert places(memory, 3, 0) == list(range(6)) and places(memory, 3, 1) == list(range(9))
    assert queries(memory, 3, 0) == [6, 7, 8] and queries(memory, 3, 1) == [9, 10, 11]


@pytest.mark.parametrize("changes", [{}, AS_RELEASED], ids=["paper", "released"])
def test_a_memory_survives_a_checkpoint(changes):
    memory = empty_memory(spec(**changes))
    for c in range(9):
        _, memory = making(c, memory)
    again = restore_memory(memory.spec, dump_memory(memory))
    for c in range(9, 12):
        (seen, memory), (seen_again, again) = making(c, memory), making(c, again)
        assert seen.frame_indices() == seen_again.frame_indices()
    assert all(torch.equal(a, b) for one, two in zip(memory.past(0), again.past(0), strict=True) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("rule", QUERIES)
def test_positions_over_time(rule):
    for chunks, first in enumerate(QUERIES[rule]):
        memory = after(chunks, positions=rule)
        assert queries(memory, 3) == [first, first + 1, first + 2]
        keys = places(memory, 3)
        if rule in ("fixed", "anchored") and chunks > 1:
            assert keys == [0, 1, 2, *range(3, 3 + len(slow(memory))), first - 3, first - 2, first - 1]


def test_slow_part_is_full_after_chunk_26_and_then_drops_its_oldest():
    assert slow(after(26)) == list(range(6, 73, 6))
    assert slow(after(30)) == list(range(18, 85, 6))


def test_what_resembles_its_predecessor_is_not_kept():
    memory = empty_memory(spec())
    for c in range(12):
        memory = memory.remember(chunk(3 * c, alike=True))
    assert slow(memory) == [] and float(memory.similarity) == pytest.approx(1)


@settings(deadline=None, max_examples=60)
@given(
    sink=st.integers(0, 4),
    most=st.integers(0, 5),
    fast=st.integers(3, 9),
    interval=st.integers(1, 3),
    promote=st.sampled_from(["similarity", "uniform"]),
    positions=st.sampled_from(["fixed", "packed", "anchored"]),
    alike=st.lists(st.booleans(), min_size=1, max_size=25),
)
def test_invariants(sink, most, fast, interval, promote, positions, alike):
    memory = empty_memory(spec(sink=sink, slow=most, fast=fast, interval=interval, promote=promote, positions=positions))
    for c, same in enumerate(alike):
        before = memory
        memory = memory.remember(chunk(3 * c, same))
        assert before.frame_count == 3 * c  # nothing was written into the old value
        numbers = [index for part in memory.frame_indices().values() for index in part]
        assert len(set(numbers)) == len(numbers) == held(memory), "sink, slow and fast are disjoint"
        assert slow(memory) == sorted(slow(memory))
        assert len(memory.sink) <= sink and len(slow(memory)) <= most
        assert len(memory.fast) == min(max(fast - 3, 0), max(3 * (c + 1) - sink, 0)), "as many of the last frames as there is room for"
        keys, query = places(memory, 3), queries(memory, 3)
        assert len(set(keys + query)) == len(keys) + 3, "no two frames at one place"
        assert min(keys + query) >= 0 and max(keys + query) < max(memory.spec.size, 3)
        assert max(keys, default=-1) < query[0] and keys == sorted(keys)


@settings(deadline=None, max_examples=60)
@given(
    alike=st.lists(st.booleans(), min_size=8, max_size=20),
    other=st.lists(st.booleans(), min_size=8, max_size=20),
    positions=st.sampled_from(["fixed", "packed", "anchored"]),
)
def test_positions_depend_on_occupancy_alone(alike, other, positions):
    """Two histories that fill the parts alike place them alike, once the video is longer than the memory."""
    one, two = empty_memory(spec(positions=positions)), empty_memory(spec(positions=positions))
    for c, same in enumerate(alike):
        one = one.remember(chunk(3 * c, same))
    for c, same in enumerate(other):
        two = two.remember(chunk(3 * c, same))
    if len(slow(one)) == len(slow(two)):
        assert places(one, 3) == places(two, 3) and queries(one, 3) == queries(two, 3)


@settings(deadline=None, max_examples=60)
@given(
    alike=st.lists(st.booleans(), min_size=1, max_size=25),
    keep=st.sampled_from(["first", "all"]),
    interval=st.integers(1, 3),
    begin=st.integers(1, 3),
    fill=st.sampled_from(["none", "early_raw"]),
    timing=st.sampled_from(["clean", "first_call"]),
    scope=st.sampled_from(["global", "layer"]),
    positions=st.sampled_from(["fixed", "packed", "anchored"]),
)
def test_the_released_readings_stay_within_bounds(alike, keep, interval, begin, fill, timing, scope, positions):
    plan = spec(keep=keep, interval=interval, begin=begin, fill=fill, timing=timing, scope=scope, positions=positions, when="enqueue")
    memory = empty_memory(plan)
    for c, same in enumerate(alike):
        frames = chunk(3 * c, same)
        memory = memory.offer(frames).offer(frames).remember(frames)
        parts, keys, query = memory.frame_indices(), places(memory, 3), queries(memory, 3)
        assert len(parts["sink"]) <= 3 and len(parts["slow"]) <= 12 and len(parts["fast"]) <= 3
        assert held(memory) == len(keys) == sum(map(len, parts.values()))
        frames_at = set(zip(keys, (index for part in parts.values() for index in part), strict=True))
        assert keys == sorted(keys) and max(keys + query) < plan.size and max(keys) < query[0]
        assert len(frames_at) == len(set(keys)), "no two frames at one place; one frame may be in slow and fast part, at the same place"
        assert memory.list_promoted() == sorted(memory.list_promoted()), "in the order of time"


def test_a_chunk_has_room_in_the_fast_part():
    with pytest.raises(ValueError, match=r"memory\.fast is 2, but it counts the current chunk of 3 latent frames"):
        spec(fast=2).check_chunk(3)
    spec(fast=3).check_chunk(3)


@pytest.mark.parametrize(
    "changes", [{"fast": 0}, {"sink": -1}, {"interval": 0}, {"tau": 1.5}, {"promote": "none"}], ids=lambda changes: next(iter(changes))
)
def test_impossible_memories_are_refused(changes):
    with pytest.raises(ValueError, match=r"; |, but "):
        spec(**changes)
