"""What is seen while a model trains is what happened."""

import json
from itertools import pairwise

import pytest
import torch

from cf_model.model.memory import empty_memory
from cf_model.model.rollout import rollout
from cf_model.train.distill import measure_student_loss, replay_window
from cf_model.train.trainer.ema import EMA
from cf_model.train.trainer.observe import QUANTILES, StepTimer, measure_promotion, select_progress_values
from tasks.runner.track import Track
from tests.small import FLOW, SHAPE, denoiser, normal, rng, rolling, spec
from tests.train.test_loop import Job, distillation, fit
from tests.train.test_loop import make as new_folder

SPEC = rolling(levels=(1.0, 0.5), window=6)


def made(memory, frames=45, seed=0):
    return rollout(denoiser(seed), normal(2, 5, 8), frames, SHAPE, spec=SPEC, memory=memory, flow=FLOW, rng=rng())


def median(memory):
    """A tau that some of the tested chunks pass and some don't."""
    return float(measure_promotion(memory, made(memory).comparisons)["similarity/q50"])


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("changes", [{}, {"when": "enqueue"}, {"fast": 3}, {"when": "enqueue", "timing": "first_call"}])
def test_promotion_is_what_counting_the_promoted_frames_gives(scope, changes):
    """Frames 0..44 in chunks of 3: chunks 2, 4, …, 14 are tested. Every promotion moves one frame to a slow part that holds all."""
    plain = spec(scope=scope, tau=1.0, **changes)
    memory = spec(scope=scope, tau=median(plain), **changes)
    out = made(memory)
    rows, values = out.comparisons, measure_promotion(memory, out.comparisons)
    layers = 2 if scope == "layer" else 1
    assert len(rows) == 14 and sum(row.decisions is not None for row in rows) == 7
    counts = out.memory.promoted_count + sum(out.memory.pending.values())  # [B, G]; those that wait in the fast part, too
    assert counts.shape == (2, layers) and 0 < int(counts.sum()) < 7 * 2 * layers, "tau lies within what is compared with it"
    assert values["promotion"] == pytest.approx(float(counts.sum()) / (7 * 2 * layers))
    if scope == "layer":
        by_layer = counts.double().mean(dim=0) / 7
        assert [values[f"promotion/layer_{n:02}"] for n in (0, 1)] == pytest.approx(by_layer.tolist())


def test_similarities_are_those_of_the_keys_and_tau_lies_among_their_quantiles():
    """By hand: the video is read again chunk by chunk and mean keys of neighbours are compared."""
    memory = spec(tau=median(spec(tau=1.0)))
    model, out = denoiser(), made(memory)
    state, keys = empty_memory(memory), []
    for chunk in out.video.split(3, dim=1):
        state = model.remember(chunk, normal(2, 5, 8), state)
        newest = (state.sink + state.fast)[-3:]
        keys.append([torch.stack([f.keys[n] for f in newest]).mean(dim=(0, 2)).flatten(1) for n in (0, 1)])  # layers of [B, N * D]
    # [chunks, layers, B], then chunks and videos together
    cosines = torch.stack([torch.stack([torch.cosine_similarity(a, b) for a, b in zip(x, y, strict=True)]) for x, y in pairwise(keys)])
    tested = cosines[1::2].transpose(1, 2).flatten(0, 1)
    cosines = cosines.transpose(1, 2).flatten(0, 1)
    values = measure_promotion(memory, out.comparisons)
    assert values["similarity"] == pytest.approx(float(cosines.mean()), abs=1e-5)
    for n in (0, 1):
        assert values[f"similarity/layer_{n:02}"] == pytest.approx(float(cosines[:, n].mean()), abs=1e-5)
        assert values[f"promotion/layer_{n:02}"] == pytest.approx(float((tested[:, n] < memory.tau).float().mean()))
    for q in QUANTILES:
        assert values[f"similarity/q{100 * q:02.0f}"] == pytest.approx(float(tested.mean(dim=1).quantile(q)), abs=1e-5)
    assert values["promotion"] == pytest.approx(float((tested.mean(dim=1) < memory.tau).float().mean()))


def test_what_is_never_promoted_has_no_rate():
    values = measure_promotion(spec(slow=0, promote="none"), made(spec(slow=0, promote="none")).comparisons)
    assert "similarity" in values and not [name for name in values if name.startswith("promotion")]
    assert measure_promotion(spec(), ()) == {}
    uniform = measure_promotion(spec(promote="uniform"), made(spec(promote="uniform")).comparisons)
    assert uniform["promotion"] == 1 and "promotion/layer_00" not in uniform


def test_the_averages_distance_is_relative_and_of_what_learns():
    model = denoiser()
    average = EMA(model, 0.1)  # a tenth of what it was is kept
    assert average.update() == 0
    with torch.no_grad():
        for p in average.model.parameters():
            p.mul_(1.5)
    assert average.update() == pytest.approx(0.05, rel=1e-4)
    frozen, *_ = model.parameters()
    frozen.requires_grad_(False)
    with torch.no_grad():
        for n, p in enumerate(average.model.parameters()):
            p.copy_(100 * p if n == 0 else list(model.parameters())[n] * 1.5)
    assert average.update() == pytest.approx(0.05, rel=1e-4)


def test_the_students_loss_has_the_gradient_that_is_replayed():
    """0.5 mse(x, (x - g).detach()) of the frames that carry gradient: its gradient in x is g over their number."""
    plan = rolling(levels=(1.0, 0.5), window=9, skip_first=1)
    out = rollout(denoiser(), normal(2, 5, 8), 12, SHAPE, spec=plan, memory=spec(), flow=FLOW, rng=rng())
    g = normal(2, 9, *SHAPE, seed=4)
    x = out.video[:, out.window].clone().requires_grad_()
    loss = 0.5 * (x - (x - g).detach())[:, 3:].square().mean()
    assert measure_student_loss(out, g) == pytest.approx(loss.item())
    model = denoiser()
    replay_window(model, out, g, normal(2, 5, 8))
    (by_hand,) = torch.autograd.grad(loss, x)
    seen = []

    def student(x_t, sigma, text, memory):
        seen.append(torch.zeros_like(x_t, requires_grad=True))
        return seen[-1]

    replay_window(student, out, g, normal(2, 5, 8))
    assert torch.allclose(torch.cat([part.grad for part in seen], dim=1), by_hand[:, 3:])


def test_a_step_tells_all_of_it(tmp_path):
    """Names by which docs/training.md explains a student's row, and where its seconds went."""
    job = distillation(steps=2)
    fit(job, Track("s", tmp_path))
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    always = {"critic_loss", "critic_gradient", "frames", "exit", "context_frames", "window", "similarity", "slow_frames"}
    student = {"student_loss", "student_gradient", "normaliser", "score_distance", "dm_gradient", "ema_distance"}
    assert always <= first.keys() and not student & first.keys() and always | student <= second.keys()
    assert {"similarity/q05", "similarity/q95", "promotion", "promotion/layer_00", "similarity/layer_01"} <= second.keys()
    times = [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    parts = ("rollout", "data", "scores", "replay", "critic", "update")
    assert all(times[1][f"seconds/{name}"] > 0 for name in parts) and "seconds/scores" not in times[0]
    named = [value for name, value in times[1].items() if name.startswith("seconds/") and name != "seconds/step"]
    assert times[1]["seconds/step"] == pytest.approx(sum(named), abs=1e-4) and times[1]["peak_mib"] > 10


def test_seconds_go_where_the_lap_says(monkeypatch):
    now = iter([10.0, 11.0, 13.0, 13.5, 14.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    timer = StepTimer()
    timer.lap("nobody started it")
    timer.start()
    timer.lap("data")
    timer.lap("rollout")
    timer.lap("data")
    assert timer.read_seconds() == {"step": 4.0, "data": 1.5, "rollout": 2.0, "rest": 0.5}


def test_on_a_gpu_seconds_are_those_of_its_stream(monkeypatch):
    """Events are recorded as the step goes and read once, when it is over; here they are stand-ins that count milliseconds."""
    recorded, waited = [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = 250.0 * len(recorded)
            recorded.append(self)

        def elapsed_time(self, other):
            assert waited, "an event is not read before the stream has come to it"
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(len(recorded)))
    timer = StepTimer(torch.device("cuda"))
    timer.start()
    timer.lap("rollout")
    timer.lap("replay")
    assert not waited
    assert timer.read_seconds() == {"step": 0.75, "rollout": 0.25, "replay": 0.25, "rest": 0.25} and waited == [4]


def test_times_of_a_resumed_run_stand_once_and_are_summed(tmp_path):
    """Killed in step 6, resumed from 4: one row a step, in runtime/ too, and nothing of them where DVC looks."""
    job, work = Job(), new_folder(tmp_path / "work")
    job.die_at = 5
    with pytest.raises(KeyboardInterrupt):
        fit(job, Track("toy", work))
    again = Job()
    track = Track("toy", work)
    fit(again, track)
    track.save_times(tmp_path / "runtime")
    rows = [json.loads(line) for line in (tmp_path / "runtime/toy.timing.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert track.facts["seconds"]["step"] == pytest.approx(sum(row["seconds/step"] for row in rows), abs=0.01)
    track.save(new_folder(tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.csv", "metrics.jsonl"]
    assert "seconds" not in (tmp_path / "out/metrics.jsonl").read_text()


def test_the_bar_shows_what_matters():
    latest = {"critic_loss": 1.0, "critic_gradient": 2.0, "exit": 3.0, "frames": 27.0, "normaliser": 5.0, "score_distance": 6.0}
    assert list(select_progress_values(latest)) == ["critic_loss", "score_distance", "frames"]
    assert list(select_progress_values({"gradient": 1.0, "ema_distance": 0.1, "loss": 2.0})) == ["loss", "gradient"]
