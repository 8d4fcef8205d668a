"""Teacher and critic see the frames that the student's own memory held (`context: memory`), video by video."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cf_model.model.context import HeldFrames, find_held_frames, imagine_memory
from cf_model.model.denoiser import Denoiser
from cf_model.model.memory import empty_memory
from cf_model.model.rollout import HorizonSpec, rollout, stream
from cf_model.model.view import TeacherView, guide_velocity
from cf_model.train.distill import compute_critic_loss
from cf_model.train.student import ScoreSpec, StudentSpec
from tests.model.test_batch_memory import READINGS, TAU, ForbidHostReads, list_slow, remembering
from tests.small import FLOW, SHAPE, denoiser, normal, rng, rolling, spec
from tests.train import ranked

VIEW = TeacherView(context="memory", sink=3, slow=12, fast=6, stride=6, chunk=3, context_sigma="zero", context_pass="joint")
TEXT, NULL = normal(2, 5, 8, seed=3), torch.zeros(5, 8)
X, CONTEXT = normal(2, 6, *SHAPE), normal(2, 7, *SHAPE, seed=4)
# the second video has fewer frames, and they are not the first places
FILLED = torch.tensor([[True] * 7, [True, False, True, False, False, True, True]])


def list_shown(shown: HeldFrames, video: int) -> list[int]:
    """The frames that are shown of one video."""
    numbers = shown.numbers[min(video, len(shown.numbers) - 1)]
    return numbers.tolist() if shown.filled is None else numbers[shown.filled[video]].tolist()


@settings(deadline=None, max_examples=5)
@given(videos=st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=3))
@pytest.mark.parametrize("reading", ["paper", "every chunk", "small"])
def test_what_is_shown_is_what_each_video_remembers(reading, videos):
    """Against the policy in plain words: the sink, what the video's own keys promote, the newest frames."""
    shown = find_held_frames(remembering(videos, READINGS[reading]))
    for video, alike in enumerate(videos):
        assert list_shown(shown, video) == [0, 1, 2, *list_slow(alike, READINGS[reading]), 33, 34, 35]
        alone = find_held_frames(remembering([alike], READINGS[reading]))
        assert list_shown(alone, 0) == list_shown(shown, video) and alone.numbers.shape[1] == shown.numbers.shape[1]


def test_layers_that_remember_different_frames_are_shown_what_most_of_them_hold():
    memory = remembering([[False] * 10, [False] * 10], READINGS["by layer"])
    # of three layers one holds 6 9 12, two hold 9 12 15, and in the second video all three hold different frames
    slow = replace(
        memory.slow,
        order=torch.arange(3).expand(2, 3, 3),
        index=torch.tensor([[[6, 9, 12], [9, 12, 15], [9, 12, 15]], [[6, 9, 0], [12, 15, 18], [0, 0, 0]]]),
        count=torch.tensor([[3, 3, 3], [2, 3, 0]]),
    )
    shown = find_held_frames(replace(memory, slow=slow))
    assert [list_shown(shown, video) for video in (0, 1)] == [[0, 1, 2, 9, 12, 15, 27, 28, 29], [0, 1, 2, 27, 28, 29]]


@pytest.mark.parametrize("reading", READINGS)
def test_what_is_shown_is_found_without_reading_a_value(reading):
    """And with every reading it is what the parts of a memory say, each frame once."""
    model, text, memories = denoiser(), normal(2, 5, 8, seed=3), []
    remember = Denoiser.remember

    class Listening(Denoiser):
        def remember(self, *given: Any, **named: Any) -> Any:
            memories.append(remember(self, *given, **named))
            return memories[-1]

    model.__class__ = Listening
    changes = {"tau": TAU} | READINGS[reading]
    chunks = stream(model, text, SHAPE, sigmas=[1.0, 0.6], chunk=3, memory=empty_memory(spec(**changes)), rng=rng())
    for _ in range(7):
        next(chunks)
    with ForbidHostReads():
        shown = [find_held_frames(memory) for memory in memories]
    for memory, frames in zip(memories, shown, strict=True):
        for video in range(2) if memory.groups == 1 else ():
            held = {frame for part in memory.frame_indices(video).values() for frame in part}
            assert list_shown(frames, video) == sorted(held)


# docs/method.md, "Promotion": the table of what chunk c sees
@pytest.mark.parametrize(("start", "slow"), [(9, []), (12, [6]), (18, [6, 12]), (36, [6, 12, 18, 24, 30]), (90, list(range(18, 85, 6)))])
def test_the_view_of_a_video_whose_every_chunk_is_news(start, slow):
    assert VIEW.context_frames(start) == [0, 1, 2, *slow, *range(start - 3, start)]
    assert VIEW.past_fast == 3 and list(VIEW.list_starts(7, 16)) == [9, 12, 15] and list(VIEW.list_starts(6, 6)) == [6]
    with pytest.raises(ValueError, match="a target begins at latent frame 10, but the student's begin with a chunk of 3"):
        VIEW.context_frames(10)


def test_the_teacher_meets_every_number_of_promoted_frames_alike_often():
    """Uniform over 0 to 5 of the tested chunks; each video by itself, and what it does not hold it is not shown."""
    draw, counts, first = rng(2), Counter[int](), Counter[int]()
    for _ in range(12):
        shown = VIEW.draw_context_frames(36, 64, draw)
        assert shown.numbers.shape == (64, 11) and shown.filled is not None
        for video in range(64):
            frames = list_shown(shown, video)
            slow = frames[3:-3]
            assert frames[:3] == [0, 1, 2] and frames[-3:] == [33, 34, 35]
            assert set(slow) <= {6, 12, 18, 24, 30} and slow == sorted(set(slow))
            counts[len(slow)] += 1
            first[6 in slow] += 1
    assert sorted(counts) == list(range(6)) and max(abs(count / 768 - 1 / 6) for count in counts.values()) < 0.05
    assert abs(first[True] / 768 - 0.5) < 0.05
    sparse = replace(VIEW, context="sparse")
    before = draw.get_state()
    assert list_shown(sparse.draw_context_frames(36, 32, draw), 0) == sparse.context_frames(36) and torch.equal(before, draw.get_state())


def test_an_imagined_memory_promotes_what_it_was_told():
    news = torch.rand(4, 20, generator=rng()) < 0.5
    memory = imagine_memory(spec(tau=0.5, interval=1, slow=4), 3, news)
    for video, row in enumerate(news.tolist()):
        expected = [3 * number for number, new in enumerate(row) if new and 1 <= number < 19][-4:]
        assert memory.frame_indices(video)["slow"] == expected


def velocities(view: TeacherView, model: Denoiser, filled: Tensor | None, rows: list[int]) -> Tensor:
    sigma = torch.tensor([0.5, 0.9])[rows]
    context = CONTEXT[rows] if filled is None or len(rows) > 1 else CONTEXT[rows][:, filled[0]]
    given = filled if len(rows) > 1 else None
    return view.velocity(model, X[rows], sigma, TEXT[rows], context, filled=given)


@pytest.mark.parametrize("context_pass", ["joint", "own"])
def test_a_video_among_others_is_scored_as_alone(context_pass):
    """The same as without its empty places: they take no time and nothing sees them. Gradients too."""
    view, model = replace(VIEW, context_pass=context_pass), denoiser()
    together = velocities(view, model, FILLED, [0, 1])
    for row in range(2):
        alone = velocities(view, model, FILLED[row : row + 1], [row])
        assert torch.allclose(together[row], alone[0], atol=1e-5)
    assert not torch.allclose(together[1], velocities(view, model, None, [0, 1])[1], atol=1e-3), "the mask was to matter"
    both = []
    for pairs in (((FILLED, [0, 1]),), ((FILLED[:1], [0]), (FILLED[1:], [1]))):
        for filled, rows in pairs:
            velocities(view, model, filled, rows).square().sum().backward()
        both.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
    assert float((both[0] - both[1]).norm() / both[1].norm()) < 1e-5


@pytest.mark.parametrize("context_pass", ["joint", "own"])
def test_guidance_and_the_critic_see_the_same_places(context_pass):
    view, model, sigma = replace(VIEW, context_pass=context_pass), denoiser(), torch.tensor([0.5, 0.9])
    changed = torch.where(FILLED[..., None, None, None], CONTEXT, 9.0)
    with torch.no_grad():
        for passes in ("apart", "together"):
            how: Any = {"view": view, "guidance": 3.0, "null": NULL, "passes": passes}
            one, two = (guide_velocity(model, TEXT, c, **how, filled=FILLED)(X, sigma) for c in (CONTEXT, changed))
            assert torch.equal(one, two)
        losses = [
            compute_critic_loss(X, TEXT, fake=model, context=c, view=view, flow=FLOW, rng=rng(), weight="bell", filled=filled)
            for c, filled in ((CONTEXT, FILLED), (changed, FILLED), (changed, None))
        ]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("context_pass", ["joint", "own"])
@pytest.mark.parametrize("sigma", ["zero", "shared"])
def test_a_kernel_that_takes_no_mask_is_shown_the_frames_alone(context_pass, sigma):
    if context_pass == "own" and sigma == "shared":
        return
    view, model = replace(VIEW, context_pass=context_pass, context_sigma=sigma), denoiser()
    same = FILLED[1:].expand(2, -1)
    masked = velocities(view, model, same, [0, 1])
    try:
        model.transformer.rope.takes_mask = False
        assert torch.allclose(velocities(view, model, same, [0, 1]), masked, atol=1e-5)
        with pytest.raises(ValueError, match=r"remember different numbers of frames.* use attention: native or cudnn, or a batch of 1"):
            velocities(view, model, FILLED, [0, 1])
    finally:
        model.transformer.rope.takes_mask = True


def student_spec(**changes: object) -> StudentSpec:
    job, _ = ranked.student()
    return replace(job.spec, **changes)  # type: ignore[arg-type]


def test_both_scores_see_what_each_video_of_the_rollout_remembered() -> None:
    """Their passes hold, video by video, the frames of its own memory at the window's start, then the window."""
    long = {"horizon": HorizonSpec(48, 48, 0, "const"), "memory": spec(slow=3, fast=6, tau=TAU), "steps": 2, "critic_updates": 1}
    job, _ = ranked.student(long)
    heard: list[tuple[Tensor, Tensor]] = []
    for model in (job.teacher, job.critic):
        velocity = model.velocity

        def listened(x: Tensor, sigma: Tensor, text: Tensor, memory: Any = None, filled: Any = None, inside: Any = velocity) -> Tensor:
            heard.append((x, filled))
            return inside(x, sigma, text, memory, filled)

        model.velocity = listened  # type: ignore[method-assign]
    made, text = job._roll_out(0, 0)
    job._get_rollout = lambda number, group: (made, text)  # type: ignore[method-assign]
    values = job._accumulate_group(0, 0, student=True, critic=True)
    memory, start = made.targets[0].memory, made.window.start
    assert memory.frame_count == start == 42
    frames = [sorted(n for part in memory.frame_indices(video).values() for n in part) for video in range(4)]
    assert len({tuple(held) for held in frames}) > 1, "the videos were to remember different frames"
    assert values["context_frames"] == sum(map(len, frames)) / 4
    assert len(heard) == 4  # the student's update: critic, teacher with the prompt and without; and the critic's own
    for x, filled in heard:
        for video, held in enumerate(frames):
            shown = x[video, :-6][filled[video, :-6]]
            assert len(shown) == len(held) and bool(filled[video, -6:].all())
            assert torch.equal(shown, made.video[video, held])


def test_a_rollout_that_continues_another_does_not_know_what_was_held():
    how: Any = {"memory": spec(), "flow": FLOW, "rng": rng()}
    overlapping = rolling(levels=(1.0,), window=6, full_first=1, skip_first=1, persist="stream")
    first = rollout(denoiser(), TEXT, 6, SHAPE, spec=overlapping, **how)
    assert first.held and list_shown(first.held, 0) == []
    assert rollout(denoiser(), TEXT, 9, SHAPE, spec=overlapping, past=first, **how).held is None


SCORES = ScoreSpec(context="memory", guidance=2.0, guidance_passes="apart", mismatch="refuse", first_latent="as_is")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rollout": rolling(skip_first=1, persist="stream", window=6)}, "context is memory, but rollout.persist is stream.*; use"),
        ({"teacher": replace(SCORES, first_latent="reencode")}, "first_latent is reencode, but teacher.context is memory.*; use"),
        ({"memory": spec(when="enqueue")}, "memory.when is enqueue, but teacher.context is memory, which knows evict"),
        ({"memory": spec(keep="all")}, "memory.keep is all"),
        ({"memory": spec(when="enqueue", fill="early_raw")}, "memory.when is enqueue"),
    ],
)
def test_what_cannot_be_shown_is_refused(changes, words):
    student_spec(teacher=replace(SCORES, context="sparse"), **{k: v for k, v in changes.items() if k != "teacher"})
    with pytest.raises(ValueError, match=words):
        student_spec(**{"teacher": SCORES} | changes)


def test_a_teacher_has_learned_the_layouts_of_the_memory_that_it_is_shown(tmp_path):
    """Sizes and grid of the student's memory, by name; tau, which only decides how many are promoted, is free."""
    wanted = student_spec(memory=spec(tau=0.9), teacher=SCORES).want_layout(VIEW)
    wanted.check(wanted, accept=False)
    assert wanted.view == VIEW
    student_spec(memory=spec(tau=0.2, positions="packed", scope="layer"), teacher=SCORES).want_layout(VIEW).check(wanted, accept=False)
    for memory, words in (
        (spec(slow=4), "stage2.teacher.context is memory, and stage2.memory.slow is 4, but the teacher was trained with 12; use that"),
        (spec(fast=9), "stage2.memory.fast is 9, but the teacher was trained with 6"),
        (spec(interval=1), "stage2.memory.interval x stage2.rollout.chunk is 3, but the teacher was trained with 6"),
    ):
        with pytest.raises(ValueError, match=words):
            wanted.check(student_spec(memory=memory, teacher=SCORES).want_layout(VIEW), accept=False)
    with pytest.raises(ValueError, match=r"stage2\.teacher\.context is memory, but the teacher was trained on sparse"):
        replace(wanted, view=replace(VIEW, context="sparse")).check(wanted, accept=False)


@pytest.mark.parametrize("changes", [{"stride": 4}, {"fast": 2}, {"chunk": 0}])
def test_a_view_of_a_memory_has_whole_chunks(changes):
    with pytest.raises(ValueError, match=r"chunk is .*, stride .* and fast .*; use a stride of whole chunks, and fast: \d or more"):
        replace(VIEW, **changes)
    if "chunk" not in changes:
        replace(VIEW, context="sparse", **changes)


def test_the_teachers_targets_begin_with_a_chunk():
    trainer, _ = ranked.teacher()
    assert list(trainer.allowed) == [6, 9, 12, 15]
    with pytest.raises(ValueError, match=r"shortest is 7 and longest 8, but view.context is memory.*of 3; use a longest of 9"):
        replace(trainer.spec, shortest=7, longest=8)
    trainer.step(0)
    assert trainer.starts.longest % 3 == 0
