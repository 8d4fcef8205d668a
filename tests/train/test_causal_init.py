"""Causal init by ODE regression: what is kept of a trajectory, what a chunk sees, what has a loss, and what a kill costs."""

import dataclasses

import pytest
import torch

from cf_model.model.flow import BatchGenerator, draw_gaussian
from cf_model.model.memory import empty_memory
from cf_model.model.view import TeacherView, sample_window
from cf_model.train.causal_init import CausalInitSpec, CausalInitTrainer
from cf_model.train.trainer.engine import OptimizerSpec
from cf_model.train.trainer.loop import fit
from cf_model.train.trainer.ode import trace_ode
from cf_model.train.trajectories import OdeSpec, OdeTrajectories
from tasks.runner.track import Track
from tests.small import FLOW, SHAPE, denoiser, normal, rng, spec

NULL = normal(5, 8, seed=7)
NONE = TeacherView(context="none", sink=0, slow=0, fast=0, stride=1, chunk=3, context_sigma="zero", context_pass="joint")


class Prompts:
    """Three prompts of students."""

    def __len__(self):
        return 3

    def __getitem__(self, at):
        return torch.stack([normal(5, 8, seed=20 + number) for number in at])


def ode(**changes):
    values = {"videos": 5, "batch": 2, "steps": 4, "keep": (0, 1, 3), "shift": 3.0, "guidance": 2.0, "context": "noisy"}
    return OdeSpec(**(values | changes))


def trajectories(folder, **changes):
    return OdeTrajectories(folder, ode(**changes), prompts=Prompts(), shape=(6, *SHAPE), flow=FLOW, dtype=torch.float32, seed=3)


@pytest.fixture
def track(tmp_path):
    return Track("causal_init", tmp_path)


def made(track, model=None, name="made", **changes):
    ways = trajectories(track.work / name, **changes)
    ways.compute(model or denoiser(), NULL, track)
    return ways


def init(ways, model=None, **changes):
    optimizer = OptimizerSpec(lr=1e-3, muon_lr=0.0, beta1=0.9, beta2=0.98, weight_decay=0.0, muon_decay=0.0, clip=1.0, warmup=0, decay=0.0)
    values = {"method": "ode", "steps": 6, "batch": 4, "frames": 6, "longest": 0, "begin": 1.0, "chunk": 3, "dropout": 0.0}
    values |= {"ode": ways.spec, "memory": spec(), "optimizer": optimizer, "ema": 0.9, "save_every": 2}
    plan = CausalInitSpec(**(values | changes))
    return CausalInitTrainer(plan, model=model or denoiser(), latents=None, flow=FLOW, seed=5, trajectories=ways)


def test_a_trajectory_ends_where_the_sampler_does():
    """An equivalence up to rounding: generation's own sampler, of the same noise. Its passes have no gradient, so fewer operations."""
    model, text = denoiser(), normal(2, 5, 8)
    flow = dataclasses.replace(FLOW, shift=3.0)
    noise = torch.randn(2, 6, *SHAPE, generator=rng())
    *_, last = trace_ode(model, text, noise, levels=ode().levels(FLOW), guidance=2.0, null=NULL)
    how = {"view": NONE, "flow": flow, "steps": 4, "guidance": 2.0, "guidance_passes": "apart", "null": NULL}
    theirs = sample_window(model, text, normal(2, 0, *SHAPE), (6, *SHAPE), **how, rng=rng())
    assert torch.allclose(last, theirs, rtol=1e-6, atol=1e-6)


def test_the_named_steps_and_the_end_are_kept(track):
    ways, model = made(track), denoiser()
    assert ways.sigmas == [FLOW_3[0], FLOW_3[1], FLOW_3[3], 0.0]
    noise = draw_gaussian((2, 6, *SHAPE), BatchGenerator([(3, 2), (3, 3)]))
    text = Prompts()[[2, 0]]  # the fourth video has the first prompt again
    states = list(trace_ode(model, text, noise, levels=FLOW_3, guidance=2.0, null=NULL))
    assert torch.equal(ways.read([2, 3]), torch.stack([states[step] for step in (0, 1, 3, 4)], dim=1))
    assert torch.equal(ways.text([2, 3]), text)


FLOW_3 = dataclasses.replace(FLOW, shift=3.0).sampler_sigmas(4)


def test_how_many_are_made_together_changes_nothing(track):
    one, all_ = made(track, name="one", batch=1), made(track, name="all", batch=5)
    assert torch.allclose(one.read([0, 4]), all_.read([0, 4]), atol=1e-6)


def test_a_kill_costs_one_batch(track):
    whole = made(track, name="whole").read([0, 1, 2, 3, 4])

    class Dying(Prompts):
        def __getitem__(self, at):
            if 2 in at:
                raise KeyboardInterrupt
            return super().__getitem__(at)

    ways = trajectories(track.work / "made")
    ways.prompts = Dying()
    with pytest.raises(KeyboardInterrupt):
        ways.compute(denoiser(), NULL, track)
    there = {file: file.stat().st_mtime_ns for file in (track.work / "made").iterdir()}
    assert [file.name for file in there] == ["00000000.safetensors"]
    (track.work / "made/00000004.safetensors").write_bytes(b"power was lost here")
    again = made(track)
    assert all(file.stat().st_mtime_ns == time for file, time in there.items()), "what was made is not made again"
    assert torch.equal(again.read([0, 1, 2, 3, 4]), whole)


def test_stopped_and_resumed_is_never_stopped(track, tmp_path):
    ways = made(track)
    whole, first, second = init(ways), init(ways), init(ways)
    for job, steps in ((whole, 4), (first, 3), (second, 4)):
        job.steps, job.save_every = steps, 2
    fit(whole, track_in(tmp_path / "a"))
    fit(first, track_in(tmp_path / "b"))
    fit(second, Track("b", tmp_path / "b"))
    pairs = zip(whole.ema.model.parameters(), second.ema.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def track_in(folder):
    folder.mkdir()
    return Track("causal_init", folder)


def reference(model, states, text, levels, sigmas, memory, clean):
    """The loss as the recipe says it: frame by frame, only those with a level."""
    wrong = []
    for number in range(2):
        part = states[:, :, 3 * number : 3 * number + 3]
        x_t = torch.stack([part[i, levels[i, number]] for i in range(len(part))])
        sigma = torch.tensor([sigmas[k] for k in levels[:, number]])
        x_0 = model(x_t, sigma, text, memory)
        wrong += [(x_0[i] - part[i, -1]).square().mean() for i in range(len(part)) if sigma[i] > 0]
        shown = (part[:, -1], None) if clean else (x_t, sigma)
        memory = model.remember(shown[0], text, memory, sigma=shown[1], grad=True)
    return torch.stack(wrong).mean()


@pytest.mark.parametrize("context", ["noisy", "clean"])
def test_the_loss_is_over_chunks_that_have_noise(track, context):
    ways = made(track, context=context)
    job, model = init(ways), denoiser()
    job.comparisons.append([])
    loss, _ = job._regress_on_ode(ways)
    loss.backward()
    r = BatchGenerator([], shared=(5, 0))
    videos = torch.randint(0, 5, (4,), generator=r).tolist()
    levels = torch.randint(4, (4, 2), generator=r)
    assert (levels == 3).any(), "one chunk at x_0, or nothing is shown"
    theirs = reference(model, ways.read(videos), ways.text(videos), levels, ways.sigmas, empty_memory(spec()), context == "clean")
    theirs.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    for (name, ours), other in zip(job.model.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours.grad, other.grad, atol=1e-6), name


def test_a_chunk_sees_those_before_it_as_noisy_as_they_are():
    """What an earlier chunk was at changes the prediction."""
    model, text = denoiser(), normal(1, 5, 8)
    first, second, sigma = normal(1, 3, *SHAPE), normal(1, 3, *SHAPE, seed=2), torch.tensor([0.7])
    memory = model.remember(first, text, empty_memory(spec()), sigma=sigma, grad=True)
    other = model.remember(first + 1, text, empty_memory(spec()), sigma=sigma, grad=True)
    low = torch.tensor([0.4])
    assert not torch.allclose(model(second, low, text, memory), model(second, low, text, other), atol=1e-4)


def test_the_loss_falls(track):
    model = denoiser()
    ways = made(track, model)
    job = init(ways, model, steps=30)
    losses = [job.step(n)["loss"] for n in range(30)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep": (0, 4)}, r"keep is \[0, 4\]; name steps in rising order, from 0 to 3"),
        ({"keep": (2, 1)}, "in rising order"),
        ({"keep": ()}, "in rising order"),
        ({"videos": 0}, "videos is 0; use 1 or more"),
        ({"shift": 0.5}, "shift is 0.5; use 1 or more"),
    ],
)
def test_settings_of_trajectories(changes, words):
    with pytest.raises(ValueError, match=words):
        ode(**changes)
