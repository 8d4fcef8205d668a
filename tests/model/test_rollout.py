from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cf_model.model import rollout as rollouts
from cf_model.model.memory import empty_memory
from cf_model.model.rollout import HorizonSpec, denoise_chunk, rollout
from cf_model.model.rollout import place_window as window_start
from tests.small import FLOW, SHAPE, denoiser, normal, rng, rolling, spec

TEXT = normal(2, 5, 8, seed=3)
ROLLOUT = rolling()


def test_the_next_chunks_noise_never_changes_a_chunk():
    def video(frames, seed):
        return rollout(denoiser(), TEXT, frames, SHAPE, spec=rolling(exit="last"), memory=spec(), flow=FLOW, rng=rng(seed)).video

    assert torch.equal(video(12, 1), video(18, 1)[:, :12]) and not torch.equal(video(12, 1), video(12, 2))


def test_each_level_begins_at_the_answer_of_the_level_before_with_fresh_noise():
    """Algorithm 1, lines 25 and 26: x_t = (1 - sigma) x_0 + sigma noise, and nothing of the x_t before."""
    model, passes = denoiser(), []
    inner, sigmas, noise = model.forward, [1.0, 0.7, 0.4], [normal(2, 3, *SHAPE, seed=seed) for seed in range(3)]

    def forward(x_t, *given):
        passes.append((x_t, inner(x_t, *given)))
        return passes[-1][1]

    model.forward = forward
    with torch.no_grad():
        x_0, (x_t, _), _ = denoise_chunk(model, TEXT, SHAPE, sigmas, 3, empty_memory(spec()), iter(noise))
    assert torch.equal(passes[0][0], noise[0]) and torch.equal(x_t, passes[-1][0]) and torch.equal(x_0, passes[-1][1])
    for (_, answer), (begins, _), fresh, sigma in zip(passes, passes[1:], noise[1:], sigmas[1:], strict=False):
        torch.testing.assert_close(begins, (1 - sigma) * answer + sigma * fresh)
    assert len(passes) == 3


@pytest.mark.parametrize("skip", [0, 1])
def test_which_chunks_carry_gradient(skip):
    made = rollout(
        denoiser(),
        TEXT,
        18,
        SHAPE,
        spec=rolling(levels=(1.0, 0.5), skip_first=skip),
        memory=spec(),
        flow=FLOW,
        rng=rng(),
    )
    assert [(t.first, t.grad) for t in made.targets] == [(9, skip == 0), (12, True), (15, True)]


def test_the_target_stops_at_one_random_level_and_the_context_is_clean():
    levels, exits = FLOW.shift_levels(ROLLOUT.levels), set()
    for seed in range(12):
        made = rollout(denoiser(), TEXT, 15, SHAPE, spec=ROLLOUT, memory=spec(), flow=FLOW, rng=rng(seed))
        assert {t.sigma for t in made.targets} == {levels[made.exits[0]]}
        exits.add(made.exits[0])
    assert exits == {0, 1, 2, 3}


def test_chunks_before_the_window_are_as_clean_as_stated():
    small = spec(sink=0, slow=0, fast=6, promote="none")

    def levels(policy):
        """Noisy passes that each chunk took, with an exit after the first."""
        model, taken = denoiser(), []
        inner = model.forward
        model.forward = lambda *args: taken.append(args[3].frame_count) or inner(*args)
        for seed in range(99):
            made = rollout(model, TEXT, 18, SHAPE, spec=rolling(full_denoise=policy), memory=small, flow=FLOW, rng=rng(seed))
            if made.exits[0] == 0:
                return [taken.count(first) for first in range(0, 18, 3)]
            taken.clear()

    assert levels("none") == [1, 1, 1, 1, 1, 1]
    assert levels("all") == [4, 4, 4, 1, 1, 1]
    assert levels("context") == [1, 4, 4, 1, 1, 1]  # the window begins at 9, the memory holds 6 frames


def test_exits_per_chunk_and_last():
    def made(seed, **changes):
        return rollout(denoiser(), TEXT, 9, SHAPE, spec=rolling(**changes), memory=spec(), flow=FLOW, rng=rng(seed))

    assert {made(seed, exit="last").exits for seed in range(4)} == {(3, 3, 3)}
    assert all(len(set(made(seed).exits)) == 1 for seed in range(4))
    assert any(len(set(made(seed, exit="per_chunk").exits)) > 1 for seed in range(4))
    assert {made(seed, full_first=2).exits[:2] for seed in range(4)} == {(3, 3)}


@pytest.mark.parametrize(("place", "mean"), [("uniform", 0.5), ("beta", 1 / 3)])
def test_where_the_window_lies(place, mean):
    noise = rng()
    starts = [window_start(99, rolling(place=place), noise) for _ in range(4000)]
    assert set(starts) <= set(range(0, 91, 3)) and {0, 3} <= set(starts)
    assert sum(starts) / len(starts) / 90 == pytest.approx(mean, abs=0.03)
    assert window_start(99, rolling(), noise) == 90


@pytest.mark.parametrize("exit", ["last", "per_chunk"])
def test_a_renoised_window_is_made_again_from_its_own_frames(exit):
    """The pass with gradient is at the last level, or at one drawn for the chunk; what it was given holds the finished frames."""
    plan, finished, model = rolling(renoise="own", exit=exit, levels=(0.3, 0.2, 0.1)), [], denoiser()
    remember = model.remember
    model.remember = lambda x_0, *given, **more: finished.append(x_0) or remember(x_0, *given, **more)
    made = rollout(model, TEXT, 18, SHAPE, spec=plan, memory=spec(), flow=replace(FLOW, shift=1.0), rng=rng(5))
    sigmas = list(plan.levels)
    assert {target.sigma for target in made.targets} == ({sigmas[-1]} if exit == "last" else set(sigmas))
    for target in made.targets:
        again = denoiser()(target.x_t, torch.full((2,), target.sigma), TEXT, target.memory)
        assert torch.allclose(again, made.video[:, target.first : target.first + 3], atol=1e-5)
        near = [F.cosine_similarity(target.x_t.flatten(), x_0.flatten(), dim=0) for x_0 in finished]
        assert max(range(6), key=near.__getitem__) == target.first // 3


def test_a_window_is_noised_to_one_level_which_may_be_any(monkeypatch):
    begun, renoise = [], rollouts.renoise_chunk

    def note(model, text, x_0, sigmas, *given):
        begun[-1].add((sigmas[0], sigmas[-1]))
        return renoise(model, text, x_0, sigmas, *given)

    monkeypatch.setattr(rollouts, "renoise_chunk", note)
    plan, levels = rolling(renoise="own", exit="last", levels=(0.9, 0.6, 0.3)), FLOW.shift_levels((0.9, 0.6, 0.3))
    for seed in range(8):
        begun.append(set())
        rollout(denoiser(), TEXT, 9, SHAPE, spec=plan, memory=spec(), flow=FLOW, rng=rng(seed))
    assert all(len(window) == 1 for window in begun)
    assert set.union(*begun) == {(level, levels[-1]) for level in levels}


def test_noise_in_the_cache_is_of_the_stated_size_and_repeats():
    def keys(noise, seed=3):
        made = rollout(denoiser(), TEXT, 9, SHAPE, spec=rolling(cache_noise=noise), memory=spec(slow=0), flow=FLOW, rng=rng(seed))
        return made, torch.stack([made.memory.sink[0].keys[0], made.memory.sink[0].values[0]])

    (_, plain), (noisy, disturbed) = keys(0.0), keys(0.5)
    assert torch.equal(disturbed, keys(0.5)[1]) and torch.equal(plain, keys(0.0)[1])
    # the first chunk's own frames know of no noise yet, so the difference is what was added to their keys and values
    for before, after in zip(plain, disturbed, strict=True):
        size = (after - before).square().mean(dim=(1, 2, 3)) / before.square().mean(dim=(1, 2, 3))
        assert torch.allclose(size.sqrt(), torch.full((2,), 0.5), rtol=0.2), "of each video"
    assert not torch.allclose(noisy.video[:, 3:6], keys(0.0)[0].video[:, 3:6], atol=1e-3), "and the next chunk sees it"
    for target in noisy.targets[1:]:  # a replay sees the same noise: it is in the memory
        again = denoiser()(target.x_t, torch.full((2,), target.sigma), TEXT, target.memory)
        assert torch.allclose(again, noisy.video[:, target.first : target.first + 3], atol=1e-5)
    with pytest.raises(ValueError, match=r"cache_noise is -1\.0, but it is a standard deviation"):
        rolling(cache_noise=-1.0)


def test_lengths_of_other_laws():
    noise = rng()
    assert {HorizonSpec(21, 240, 10, "const").sample_length(0, 3, noise) for _ in range(9)} == {240}
    halfway = {HorizonSpec(30, 120, 100, "exp").sample_length(50, 3, noise) for _ in range(2000)}
    assert max(halfway) == 60 and min(halfway) == 30


def test_lengths_grow_with_the_curriculum():
    horizon, noise = HorizonSpec(shortest=42, longest=120, decay=100, mode="linear"), rng()
    assert {horizon.sample_length(0, 3, noise) for _ in range(200)} == {42}
    assert {horizon.sample_length(100, 3, noise) for _ in range(2000)} == set(range(42, 121, 3))
    assert {horizon.sample_length(10**9, 3, noise) for _ in range(2000)} == set(range(42, 121, 3))
