# Long: one loop, whatever it trains.
import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from cf_model.model import checkpoint
from cf_model.model.rollout import HorizonSpec
from cf_model.model.view import TeacherView
from cf_model.train.student import DistillationTrainer, ScoreSpec, StudentSpec
from cf_model.train.trainer.batch import drop_prompts
from cf_model.train.trainer.ema import EMA
from cf_model.train.trainer.engine import Optimizer, OptimizerSpec
from cf_model.train.trainer.loop import fit
from cf_model.train.trainer.observe import StepTimer
from cf_model.train.trainer.ranks import BatchRandom
from tasks.runner.track import Track
from tests.small import FLOW, SHAPE, denoiser, normal, restored, rolling, spec
from tests.train.ranked import Clips


def optimizer(**changes):
    values = {"lr": 1e-3, "muon_lr": 0.01, "beta1": 0.9, "beta2": 0.98, "weight_decay": 0.01, "muon_decay": 0.02}
    return OptimizerSpec(**(values | {"clip": 1.0, "warmup": 3, "decay": 0.5} | changes))


class Job:
    """A little training with everything that a real one has: model, optimisers, average, random numbers."""

    def __init__(self, steps=8):
        self.model, self.random = denoiser(), BatchRandom(5, batch=4)
        self.optimizer, self.ema = Optimizer(self.model, optimizer(), steps), EMA(self.model, 0.9)
        self.state = {"model": self.model, "optimizer": self.optimizer, "average": self.ema}
        self.steps, self.save_every, self.newest_batch, self.timer = steps, 2, {}, StepTimer()
        self.die_at = None

    def step(self, number):
        if number == self.die_at:
            raise KeyboardInterrupt
        rng = self.random.draw_step(number)
        x = torch.randn(2, 3, *SHAPE, generator=rng)
        loss = self.model.velocity(x, torch.rand(2, generator=rng), normal(2, 5, 8)).square().mean()
        loss.backward()
        norm = self.optimizer.step()
        self.ema.update()
        return {"loss": loss.item(), "gradient": norm}


def weights(job):
    return torch.cat([p.detach().flatten() for p in [*job.model.parameters(), *job.ema.model.parameters()]])


@pytest.mark.parametrize("die_at", [3, 4, 7])
def test_resumed_is_never_stopped_to_the_bit(tmp_path, die_at):
    whole, first, second = Job(), Job(), Job()
    fit(whole, Track("whole", make(tmp_path / "whole")))
    first.die_at = die_at
    with pytest.raises(KeyboardInterrupt):
        fit(first, Track("job", make(tmp_path / "job")))
    track = Track("job", tmp_path / "job")
    fit(second, track)
    assert torch.equal(weights(whole), weights(second))
    assert track.facts["resumed_at"] == die_at // 2 * 2
    assert track.curve.read_text() == (tmp_path / "whole/metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in track.curve.read_text().splitlines()] == list(range(1, 9))


def make(folder):
    folder.mkdir()
    return folder


def shorten(path):
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:1000])


def flip(path):
    file = path / "average.safetensors"
    held = bytearray(file.read_bytes())
    held[-100] ^= 1
    file.write_bytes(held)


DAMAGE = {
    "model.safetensors has 1000 bytes": shorten,
    "average.safetensors is not what was written": flip,
    "average.safetensors is missing": lambda path: (path / "average.safetensors").unlink(),
    ".*No such file": lambda path: (path / "manifest.json").unlink(),
    "Expecting|Unterminated": lambda path: (path / "manifest.json").write_text((path / "manifest.json").read_text()[:99]),
}


@pytest.mark.parametrize(("why", "damage"), DAMAGE.items(), ids=["short", "flipped", "missing", "no manifest", "half a manifest"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, why, damage):
    job = Job()
    for step in (2, 4, 6):
        checkpoint.save_checkpoint(tmp_path, step, {name: part.state_dict() for name, part in job.state.items()})
    kept = sorted(tmp_path.glob("step-*"))
    assert len(kept) == checkpoint.CHECKPOINTS_TO_KEEP
    damage(kept[-1])
    with pytest.warns(UserWarning, match=rf"step-00000006 can't be used \({why}"):
        assert restored(tmp_path, Job().state) == 4


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_its_batch(tmp_path):
    """Two bad steps change nothing; the third in a row ends the run. What each was made of can be read."""
    job = Job()
    good_step = job.step

    def step(number):
        job.newest_batch["x"] = torch.full((2,), float(number))
        if number in (1, 3, 4, 5):
            before = weights_of(job.model)
            (job.model.velocity(normal(2, 3, *SHAPE), torch.rand(2), normal(2, 5, 8)).sum() * math.nan).backward()
            norm = job.optimizer.step()
            assert torch.equal(before, weights_of(job.model)) and not math.isfinite(norm)
            return {"loss": math.nan}
        return good_step(number)

    job.step, job.save_every = step, 1

    with (
        pytest.warns(UserWarning, match="step 2: loss is nan; what it would have changed was left as it was"),
        pytest.raises(ValueError, match=r"step 6: loss is nan, the third bad step in a row.*checkpoint \(step-00000003\) is intact"),
    ):
        fit(job, Track("t", tmp_path))
    assert sorted(path.name for path in tmp_path.glob("bad-*")) == [f"bad-0000000{n}" for n in (2, 4, 5, 6)]
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-00000001", "step-00000003"]
    assert torch.equal(load_file(tmp_path / "bad-00000004/batch.safetensors")["batch/x"], torch.full((2,), 3.0))
    checkpoint.verify_checkpoint(tmp_path / "bad-00000006")


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_gradient_that_is_not_finite_stops_before_a_checkpoint(tmp_path):
    job = Job(steps=4)
    job.save_every = 1
    with torch.no_grad():
        job.model.transformer.proj_out.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"step 3: \w+ is nan.*none yet"), pytest.warns(UserWarning):
        fit(job, Track("t", tmp_path))
    assert not list(tmp_path.glob("step-*"))


def test_every_weight_is_in_one_optimiser_and_moves():
    job = Job()
    held = [id(p) for part, _ in job.optimizer.parts for group in part.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in job.model.parameters())
    before = [p.detach().clone() for p in job.model.parameters()]
    for n in range(3):
        job.step(n)
    still = [name for (name, p), old in zip(job.model.named_parameters(), before, strict=True) if torch.equal(p, old)]
    assert still == []


def test_weights_move_at_the_papers_learning_rate():
    model = denoiser()
    train = Optimizer(model, optimizer(lr=2e-6, muon_lr=0.0, warmup=0), 10)
    before = [p.detach().clone() for p in model.parameters()]
    model.velocity(normal(2, 3, *SHAPE), torch.tensor([0.5, 0.9]), normal(2, 5, 8)).square().mean().backward()
    train.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True) if p.abs().max() < 1e3)


def test_a_dropped_prompt_is_the_empty_one():
    empty = normal(5, 8, seed=2)
    text = drop_prompts(normal(400, 5, 8), empty, 0.25, BatchRandom(1, batch=400))
    dropped = (text == empty).flatten(1).all(1).float().mean()
    assert 0.18 < float(dropped) < 0.32


def distillation(clips=None, **changes):
    plan = {
        "steps": 6,
        "critic_updates": 2,
        "critic_warmup": 0,
        "rollouts": "each",
        "batch": 2,
        "memory": spec(),
        "rollout": rolling(levels=(1.0, 0.5), window=6),
        "horizon": HorizonSpec(shortest=9, longest=15, decay=0, mode="linear"),
        "teacher": ScoreSpec(context="sparse", guidance=2.0, guidance_passes="apart", mismatch="refuse", first_latent="as_is"),
        "critic_weight": "uniform",
        "student_optimizer": optimizer(muon_lr=0.0),
        "critic_optimizer": optimizer(muon_lr=0.0),
        "ema": 0.9,
        "ema_start": 0,
        "ema_ramp": True,
        "save_every": 10,
    }
    view = TeacherView(context="sparse", sink=3, slow=12, fast=6, stride=6, chunk=3, context_sigma="zero", context_pass="joint")
    return DistillationTrainer(
        StudentSpec(**(plan | changes)),
        student=denoiser(0),
        teacher=denoiser(1),
        critic=denoiser(1),
        view=view,
        flow=FLOW,
        prompts=normal(3, 5, 8),
        null=torch.zeros(5, 8),
        shape=SHAPE,
        seed=0,
        clips=clips,
    )


def test_distillation_trains_student_and_critic_by_turns():
    job = distillation()
    before = {name: [p.detach().clone() for p in getattr(job, name).parameters()] for name in ("student", "teacher", "critic")}

    def moved(name):
        return any(not torch.equal(p, q) for p, q in zip(getattr(job, name).parameters(), before[name], strict=True))

    first = job.step(0)
    assert (moved("student"), moved("critic"), moved("teacher")) == (False, True, False) and "dm_gradient" not in first
    second = job.step(1)
    assert moved("student") and not moved("teacher") and second["dm_gradient"] > 0 and second["context_frames"] > 0


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_stream_goes_on_across_steps_and_across_a_resume(tmp_path, scope):
    """18 frames in windows of 6 that overlap by 3: steps 0 to 4 are one stream, step 5 begins another."""
    changes = {
        "rollout": rolling(levels=(1.0, 0.5), window=6, skip_first=1, persist="stream"),
        "horizon": HorizonSpec(shortest=18, longest=18, decay=0, mode="const"),
        "memory": spec(scope=scope, tau=1.0),
    }
    through, values, texts = distillation(**changes), [], []
    for number in range(6):
        if number == 3:
            checkpoint.save_checkpoint(tmp_path, 3, {name: part.state_dict() for name, part in through.state.items()})
        values.append(through.step(number))
        texts.append(through.streams.groups[0].text)
    assert all(torch.equal(text, texts[0]) for text in texts[:5]), "one video, one prompt"
    assert [row["frames"] for row in values] == [6, 9, 12, 15, 18, 6]
    resumed = distillation(**changes)
    assert restored(tmp_path, resumed.state) == 3
    assert [resumed.step(number) for number in (3, 4, 5)] == values[3:]
    assert all(torch.equal(a, b) for a, b in zip(through.student.parameters(), resumed.student.parameters(), strict=True))


def test_without_a_past_the_contextual_loss_is_self_forcings():
    """A window at the video's start has no context: both stages then are one loss, on the same seed."""
    alone = {
        "memory": spec(sink=0, slow=0, fast=6, promote="none", positions="absolute"),
        "horizon": HorizonSpec(shortest=6, longest=6, decay=0, mode="linear"),
        "critic_updates": 1,
    }
    none = ScoreSpec(context="none", guidance=2.0, guidance_passes="apart", mismatch="refuse", first_latent="as_is")
    one, two = distillation(**alone), distillation(**alone, teacher=none)
    two.view = dataclasses.replace(two.view, context="none")
    assert [one.step(0), one.step(1)] == [two.step(0), two.step(1)]
    assert all(torch.equal(a, b) for a, b in zip(one.student.parameters(), two.student.parameters(), strict=True))


def test_the_picture_that_begins_what_the_scores_see():
    """The window's (or the context's) first latent is made of all that came before it, itself included."""
    job, asked = distillation(horizon=HorizonSpec(12, 12, 0, "const")), []
    job.spec = dataclasses.replace(job.spec, teacher=dataclasses.replace(job.spec.teacher, first_latent="reencode"))
    job.view = dataclasses.replace(job.view, context="none")
    job.reencode = lambda latents: asked.append(latents) or latents[:, -1:] + 100
    made, _ = job._roll_out(0, 0)
    context, target = job.split_rollout(made, job.find_context(made))
    assert context.shape[1] == 0 and torch.equal(asked[0], made.video[:, :7])
    assert torch.equal(target[:, :1], made.video[:, 6:7] + 100) and torch.equal(target[:, 1:], made.video[:, 7:12])


def test_the_critic_is_warmed_up_before_the_student_moves():
    """Updates of the student after steps 4 and 6 alone, and a learning rate whose schedule counts those two."""
    job = distillation(critic_warmup=2)
    assert job.spec.student_updates == 2
    moved = ["student_gradient" in job.step(number) for number in range(6)]
    assert moved == [False, False, False, True, False, True]
    with pytest.raises(ValueError, match="steps is 6, critic_updates 2, critic_warmup 6: the student would never change"):
        distillation(critic_warmup=6)


@pytest.mark.parametrize("share", [False, True])
def test_a_window_continues_a_real_clip(share):
    """The context is the clip's beginning, as the student's memory has read it, and only the window is the student's."""
    clips = Clips()
    job = distillation(rollout=rolling(levels=(1.0, 0.5), window=6, begin="share" if share else "real"), clips=clips)
    generated, text = job._roll_out(0, 0)
    context = generated.video[:, : generated.window.start]
    row = next(row for row in clips.rows("train") if torch.equal(clips.text([row])[0], text[0]))
    assert torch.equal(context[:1], clips.window([row], [0], context.shape[1])) and len(generated.targets) == 2
    memory = job.student.remember_clip(context, text, job.spec.memory, chunk=3)
    first = generated.targets[0]
    replayed = job.student(first.x_t, first.x_t.new_full((2,), first.sigma), text, memory)
    assert torch.equal(replayed, job.student(first.x_t, first.x_t.new_full((2,), first.sigma), text, first.memory))
    assert [round(job.spec.real_chance(step), 2) for step in (0, 3, 6)] == ([1, 0.5, 0] if share else [1, 1, 1])


def test_with_mixed_the_student_goes_on_from_a_clip_before_the_window():
    """The beginning is a clip's, of every length from none to all that comes before the window; the student's own frames follow it."""
    clips, real = Clips(), set()
    mixed = rolling(levels=(1.0, 0.5), window=6, begin="mixed")
    job = distillation(rollout=mixed, horizon=HorizonSpec(15, 15, 0, "const"), clips=clips)
    for number in range(24):
        job.random.rng = job.random.draw_step(number)
        generated, text = job._roll_out(number, 0)
        row = next(row for row in clips.rows("train") if torch.equal(clips.text([row])[0], text[0]))
        assert generated.video.shape[1] == 15 and generated.window.start == 9
        same = (generated.video[0] == clips.window([row], [0], 15)[0]).flatten(1).all(dim=1).tolist()
        real.add(sum(same))
        assert same == sorted(same, reverse=True), "nothing of the clip comes after the student's own frames"
        assert generated.held and generated.held.numbers.max() == 8, "the scores are shown what the memory held of both"
    assert real == {0, 3, 6, 9}


def test_clips_that_are_shorter_than_the_longest_context_are_refused_at_once():
    class ShortClips(Clips):
        def rows(self, split, at_least=1):
            raise ValueError(f"no {split} clip of {at_least} latent frames")

    with pytest.raises(ValueError, match="no train clip of 93 latent frames"):
        distillation(
            rollout=rolling(levels=(1.0, 0.5), window=6, begin="real"), horizon=HorizonSpec(9, 99, 0, "linear"), clips=ShortClips()
        )
