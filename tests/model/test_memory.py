import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cf_model.model.memory import ContextMemory, Frame
from tests.small import rng, spec


def chunk(first: int, alike: bool = False, length: int = 3) -> tuple[Frame, ...]:
    """Frames whose keys resemble those of every other `alike` chunk, or nothing."""
    key = torch.ones(1, 2, 1, 8) if alike else torch.randn(1, 2, 1, 8, generator=rng(first))
    return tuple(Frame(first + i, (key,), (key,)) for i in range(length))


def after(chunks: int, **changes: object) -> ContextMemory:
    memory = ContextMemory(spec(**changes))
    for c in range(chunks):
        memory = memory.remember(chunk(3 * c))
    return memory


def indices(frames: tuple[Frame, ...]) -> list[int]:
    return [frame.index for frame in frames]


# docs/method.md 6.6, "proposed": what chunk c sees when every tested chunk is news
TIMELINE = {
    0: ([], [], []),
    1: ([0, 1, 2], [], []),
    2: ([0, 1, 2], [], [3, 4, 5]),
    3: ([0, 1, 2], [], [6, 7, 8]),
    4: ([0, 1, 2], [6], [9, 10, 11]),
    5: ([0, 1, 2], [6], [12, 13, 14]),
    6: ([0, 1, 2], [6, 12], [15, 16, 17]),
    8: ([0, 1, 2], [6, 12, 18], [21, 22, 23]),
    12: ([0, 1, 2], [6, 12, 18, 24, 30], [33, 34, 35]),
}
QUERIES = {  # of the current chunk, after 0, 1, 2, … chunks
    "fixed": [18] * 13,
    "anchored": [0, 3, 6, 9, 12, 15] + [18] * 7,
    "packed": [0, 3, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11],
    "absolute": list(range(0, 39, 3)),
}


@pytest.mark.parametrize("chunks", TIMELINE)
def test_timeline_of_the_paper(chunks):
    memory = after(chunks)
    assert (indices(memory.sink), indices(memory.slow), indices(memory.fast)) == TIMELINE[chunks]


@pytest.mark.parametrize("rule", QUERIES)
def test_positions_over_time(rule):
    for chunks, first in enumerate(QUERIES[rule]):
        memory = after(chunks, positions=rule)
        assert memory.query_positions(3) == [first, first + 1, first + 2]
        keys = memory.key_positions(3)
        if rule in ("fixed", "anchored") and chunks > 1:
            assert keys == [0, 1, 2, *range(3, 3 + len(memory.slow)), first - 3, first - 2, first - 1]


def test_slow_part_is_full_after_chunk_26_and_then_drops_its_oldest():
    assert indices(after(26).slow) == list(range(6, 73, 6))
    assert indices(after(30).slow) == list(range(18, 85, 6))


def test_what_resembles_its_predecessor_is_not_kept():
    memory = ContextMemory(spec())
    for c in range(12):
        memory = memory.remember(chunk(3 * c, alike=True))
    assert memory.slow == () and memory.similarity == pytest.approx(1)


@settings(deadline=None, max_examples=60)
@given(
    sink=st.integers(0, 4),
    slow=st.integers(0, 5),
    fast=st.integers(3, 9),
    interval=st.integers(1, 3),
    promote=st.sampled_from(["similarity", "uniform"]),
    positions=st.sampled_from(["fixed", "packed", "anchored"]),
    alike=st.lists(st.booleans(), min_size=1, max_size=25),
)
def test_invariants(sink, slow, fast, interval, promote, positions, alike):
    memory = ContextMemory(spec(sink=sink, slow=slow, fast=fast, interval=interval, promote=promote, positions=positions))
    for c, same in enumerate(alike):
        before = memory
        memory = memory.remember(chunk(3 * c, same))
        assert before.seen == 3 * c  # nothing was written into the old value
        held = indices(memory.frames)
        assert len(set(held)) == len(held) == len(memory.frames), "sink, slow and fast are disjoint"
        assert indices(memory.slow) == sorted(indices(memory.slow))
        assert len(memory.sink) <= sink and len(memory.slow) <= slow
        assert len(memory.fast) == min(max(fast - 3, 0), max(3 * (c + 1) - sink, 0)), "as many of the last frames as there is room for"
        keys, query = memory.key_positions(3), memory.query_positions(3)
        assert len(set(keys + query)) == len(keys) + 3, "no two frames at one place"
        assert min(keys + query) >= 0 and max(keys + query) < max(memory.spec.size, 3)
        assert max(keys, default=-1) < query[0]


@pytest.mark.parametrize(
    "changes", [{"fast": 0}, {"sink": -1}, {"interval": 0}, {"tau": 1.5}, {"promote": "none"}], ids=lambda changes: next(iter(changes))
)
def test_impossible_memories_are_refused(changes):
    with pytest.raises(ValueError, match=r"; |, but "):
        spec(**changes)
