"""Videos while a model trains: of the averaged weights, the same after a resume, and without a trace in what is learned."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cf_model.codec.codec_file import load_codec
from cf_model.data.video import write_video
from cf_model.model import checkpoint
from cf_model.model.view import TeacherView
from cf_model.train.trainer import loop
from cf_model.train.trainer.samples import ContinuedSpec, SampleSpec, sample_continuation
from tasks.runner.track import Track
from tests.small import FLOW, SHAPE, denoiser, normal
from tests.train import ranked

STEPS = 9


def folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def trained(name: str, work: Path, every: int = 2, die_at: int | None = None) -> Any:
    """A few steps of a small job, in a folder it may have been killed in before."""
    job, _ = getattr(ranked, name)()
    track = Track(name, folder(work))
    sample = ranked.sampler(job, track, ranked.small_codec(work / "codec"), every)

    step = job.step

    def dying_step(number: int) -> dict[str, float]:
        if number == die_at:
            raise KeyboardInterrupt
        return step(number)

    job.step, job.steps, job.save_every = dying_step, STEPS, 4
    before = torch.get_rng_state()
    loop.fit(job, track, sample)
    assert torch.equal(torch.get_rng_state(), before), "nor are the global random numbers used"
    return job


def digests(work: Path) -> dict[str, str]:
    return {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in sorted((work / "samples").glob("*"))}


def weights(job: Any) -> torch.Tensor:
    models = [value for value in job.state.values() if hasattr(value, "parameters")] + [job.ema.model]
    return torch.cat([p.detach().flatten() for model in models for p in model.parameters()])


@pytest.mark.parametrize("name", ["base", "teacher", "causal_init", "student"])
def test_what_is_learned_is_the_same_with_and_without_samples(name: str, tmp_path: Path) -> None:
    """Weights, checkpoints and all metrics but the videos' own: no random number of the training, and no state, is used up."""
    on, off = trained(name, tmp_path / "on"), trained(name, tmp_path / "off", every=0)
    assert torch.equal(weights(on), weights(off))
    file = "step-00000008/manifest.json"
    assert (tmp_path / "on" / file).read_bytes() == (tmp_path / "off" / file).read_bytes()
    logged, plain = (list(map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())) for name in ("on", "off"))
    assert [row["step"] for row in logged if row.pop("clipped", None) is not None] == [2, 4, 6, 8] and logged == plain
    assert list(digests(tmp_path / "on")) == [f"step-{step:06d}-{number}.mp4" for step in (2, 4, 6, 8) for number in (0, 1)]
    assert not (tmp_path / "off/samples").exists() and len(set(digests(tmp_path / "on").values())) == 8
    rows = [json.loads(line) for file in ("metrics.jsonl", "timing.jsonl") for line in (tmp_path / "on" / file).read_text().splitlines()]
    names = {re.sub(r"/q\d\d$", "/q05", re.sub(r"layer_\d+$", "layer_NN", name)).removeprefix("seconds/") for row in rows for name in row}
    page = (Path(__file__).parent.parent / "docs/training.md").read_text()
    assert [name for name in names - {"step"} if f"`{name}`" not in page] == [], "docs/training.md has a word on every value"


@pytest.mark.parametrize("die_at", [5, 8])
def test_killed_and_resumed_has_the_samples_of_a_run_never_stopped(die_at: int, tmp_path: Path) -> None:
    """Killed after a set that no checkpoint knows of yet (step 6, saved at 4), or just after both (step 8)."""
    trained("student", tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained("student", tmp_path / "killed", die_at=die_at + 1 if die_at == 5 else die_at)
    left = digests(tmp_path / "killed")
    assert f"step-{6 if die_at == 5 else 8:06d}-1.mp4" in left
    trained("student", tmp_path / "killed")
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def test_a_checkpoint_means_that_the_steps_samples_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while step 4 is saved: had its videos come after, a run that goes on from 4 would never make them."""
    real, there = checkpoint.save_checkpoint, []

    def save(*given: Any) -> Any:
        there.append(sorted(digests(tmp_path / "job")))
        return real(*given)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    trained("base", tmp_path / "job")
    assert [names[-1] for names in there] == ["step-000004-1.mp4", "step-000008-1.mp4"]


def test_samples_are_of_the_averaged_weights_with_the_prompts_own_noise(tmp_path: Path) -> None:
    """The last set, made again by hand: from the average it is the file, from the raw weights it is not."""
    job = trained("student", tmp_path / "job", every=STEPS)
    file = tmp_path / f"job/samples/step-{STEPS:06d}-1.mp4"
    codec = load_codec(tmp_path / "job/codec")

    def again(model: Any, seed: int) -> bytes:
        plan = SampleSpec(every=1, prompts=1, frames=12, seed=seed, crf=16)
        spec = {"spec": plan, "levels": (1.0, 0.5), "chunk": 3, "memory": job.spec.memory, "flow": FLOW}
        clips = ranked.Clips()
        text, real, rng = clips.text([1]), clips.window([1], [0], 0), plan.rng(1, torch.device("cpu"))
        parts = list(ranked.sample_stream(model, text, real, rng, **spec))
        assert sum(part.shape[1] for part in parts) == 12
        frames = (frame for part in codec.decode_stream(parts) for frame in part[0].numpy())
        write_video(tmp_path / "again.mp4", frames, fps=16, crf=16)
        return (tmp_path / "again.mp4").read_bytes()

    assert again(job.ema.model, 1) == file.read_bytes()
    assert again(job.student, 1) != file.read_bytes() != again(job.ema.model, 2)


def test_the_teacher_goes_on_from_a_real_beginning() -> None:
    plan = ContinuedSpec(every=1, prompts=1, frames=10, seed=0, crf=16, sampler_steps=2, guidance=2.0, prefix=6)
    view = TeacherView(context="sparse", sink=3, slow=3, fast=3, stride=2, chunk=3, context_sigma="zero", context_pass="joint")
    text, null, real = normal(1, 5, 8), normal(5, 8, seed=3), normal(1, 6, *SHAPE)

    def window(real: torch.Tensor) -> torch.Tensor:
        rng = plan.rng(0, torch.device("cpu"))
        first, then = sample_continuation(denoiser(), text, real, rng, spec=plan, view=view, flow=FLOW, null=null)
        assert torch.equal(first, real) and then.shape[1] == 4
        return then

    assert not torch.allclose(window(real), window(real.flip(1))), "what it makes depends on what it was shown"


def test_files_and_media_leave_the_stage(tmp_path: Path) -> None:
    """In the out folder, and handed to W&B once for every set, under names that are the same in every run."""
    shown: list[Any] = []
    work, out = folder(tmp_path / "job"), folder(tmp_path / "out")
    job, _ = ranked.base()
    track = Track("base", work)
    track.show = lambda step, files, captions: shown.append((step, sorted(files), captions))  # type: ignore[method-assign]
    sample = ranked.sampler(job, track, ranked.small_codec(tmp_path / "codec"), 3)
    job.steps, job.save_every = STEPS, 4
    loop.fit(job, track, sample)
    track.save(out)
    assert sorted(path.name for path in (out / "samples").iterdir()) == list(digests(work))
    assert shown == [(step, ["samples/0", "samples/1"], {"samples/0": "clip 0", "samples/1": "clip 1"}) for step in (3, 6, 9)]
    times = [json.loads(line) for line in (work / "timing.jsonl").read_text().splitlines()]
    assert times[2]["seconds/samples"] > 10 * times[1]["seconds/samples"]


def test_a_full_disk_names_the_file_and_keeps_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cf_model.sample_videos.write_video", full)
    with pytest.raises(ValueError, match=r"no room for step-000006-0\.mp4.*step-00000004, is intact"):
        trained("base", tmp_path / "job", every=6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"every": -1}, "every is -1"),
        ({"prompts": 0}, "prompts 0"),
        ({"crf": 60}, "crf is 60; use 0..51"),
    ],
)
def test_what_no_samples_can_be(change: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SampleSpec(**({"every": 1, "prompts": 1, "frames": 3, "seed": 0, "crf": 16} | change))
