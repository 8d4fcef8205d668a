"""Which noise, memory and levels a video is made with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cf_model.data.latents import Latents
from cf_model.model import wan
from cf_model.text.encoder import WordEncoder
from tasks import generate
from tasks.params import load, schema
from tasks.runner.track import Track
from tests.small import denoiser, normal, write_clips
from tests.train import ranked

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def stated() -> schema.Params:
    p = load.load_params(ROOT / "profiles/smoke.yaml")
    linear = replace(p.codec.linear, channels=4)
    return p.model_copy(update={"codec": p.codec.model_copy(update={"linear": linear})})


def video(p: schema.Params, system: str, *, seed: int = 0, number: int = 0, real: torch.Tensor | None = None) -> torch.Tensor:
    listed = {**p.generate.continuations, **p.generate.systems} if real is None else p.generate.continuations
    job = generate.VideoJob("prompts", system, listed[system], number, seed, "a prompt", None, real)
    model = denoiser(3)
    text = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    return torch.cat(list(generate.generate_latents(p, [job], {listed[system].weights: model}, text, torch.zeros(5, 8))), dim=1)


def test_same_seed_same_video_other_seed_other_video(stated: schema.Params) -> None:
    first = video(stated, "stage2")
    assert first.shape == (1, 21, 4, 4, 4)
    assert torch.equal(first, video(stated, "stage2"))
    assert not torch.equal(first, video(stated, "stage2", seed=1)) and not torch.equal(first, video(stated, "stage2", number=1))


def test_a_continuation_begins_with_what_was_real(stated: schema.Params) -> None:
    real = torch.randn(1, 21, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    for system in ("stage2", "teacher_slow_fast", "teacher_none"):
        made = video(stated, system, real=real)
        assert made.shape[1] == 42 and torch.equal(made[:, :21], real)


def test_a_stage_is_run_with_the_memory_it_was_trained_with(stated: schema.Params) -> None:
    """Another memory for stage 2 changes stage 2's video and nobody else's; a stated one is an ablation of its own."""
    longer = {name: system.model_copy(update={"frames": 42}) for name, system in stated.generate.systems.items()}
    stated = stated.model_copy(update={"generate": stated.generate.model_copy(update={"systems": longer, "continuations": {}})})
    other = stated.model_copy(update={"stage2": replace(stated.stage2, memory=replace(stated.stage2.memory, positions="packed"))})
    assert torch.equal(video(stated, "stage1"), video(other, "stage1"))
    assert not torch.equal(video(stated, "stage2"), video(other, "stage2"))
    assert torch.equal(video(stated, "stage2_without_slow"), video(other, "stage2_without_slow"))


@pytest.mark.parametrize("system", ["base", "stage2", "stage2_without_slow", "teacher_slow_fast"])
def test_videos_made_together_are_those_made_alone(stated: schema.Params, system: str) -> None:
    """Also where videos promote different frames (`stage2`), and where each continues its own clip (`teacher_slow_fast`)."""
    suite = "continuations" if system.startswith("teacher") else "prompts"
    listed = stated.generate.continuations if suite == "continuations" else stated.generate.systems
    real = torch.randn(3, 1, 21, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    begin = real if suite == "continuations" else [None] * 3
    jobs = [generate.VideoJob(suite, system, listed[system], n, 0, f"prompt {n}", None, begin[n]) for n in range(3)]
    models, text = {listed[system].weights: denoiser(3)}, torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))

    def make(rows: list[int]) -> torch.Tensor:
        pieces = generate.generate_latents(stated, [jobs[row] for row in rows], models, text[rows], torch.zeros(5, 8))
        return torch.cat(list(pieces), dim=1)

    together = make([0, 1, 2])
    for row in range(3):
        assert float((make([row])[0] - together[row]).abs().max()) < 1e-5


def test_batches_are_of_one_system(stated: schema.Params) -> None:
    system = stated.generate.systems["stage2"]
    jobs = [generate.VideoJob("prompts", name, system, n, 0, "", None, None) for name in ("one", "two") for n in range(5)]
    real = [generate.VideoJob("prompts", "real", None, n, 0, "", "clip", None) for n in range(3)]
    assert [len(group) for group in generate.group_jobs([*real, *jobs], 3)] == [1, 1, 1, 3, 2, 3, 2]
    assert {job.name for group in generate.group_jobs(jobs, 3) for job in group[1:] if job.name != group[0].name} == set()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three held-out clips, a codec, and one small model, which stands for all systems."""
    root = tmp_path_factory.mktemp("generate")
    clips = [({"id": f"c{n}", "caption": f"clip {n}", "split": "heldout"}, normal(9, 4, 4, 4, seed=n)) for n in range(3)]
    write_clips(root / "latents", clips, WordEncoder(5, 8).encode)
    wan.save_transformer(denoiser(3), root / "model")
    systems = dict.fromkeys(("base", "teacher", "causal_init", "stage1", "stage2"), root / "model")
    return {"latents": root / "latents", "codec": ranked.small_codec(root / "codec"), **systems}


@pytest.mark.parametrize("place", ["between two batches", "within a batch"])
def test_killed_and_started_again_goes_on_with_the_same_bytes(
    place: str, stated: schema.Params, project: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three batches of two videos: a batch that is complete is not made again, and no file is left half-written."""
    only = {"stage2": stated.generate.systems["stage2"].model_copy(update={"frames": 6})}
    some = {"prompts": 3, "continued": 3, "seeds": [0, 1], "frames": 9, "prefix": 3, "batch": 2, "systems": only, "continuations": {}}
    text = stated.text.model_copy(update={"tokens": 5, "channels": 8})
    params = stated.model_copy(update={"generate": stated.generate.model_copy(update=some), "text": text})
    made, written, die_at = list[list[str]](), list[Path](), {"between two batches": (2, 99), "within a batch": (99, 9)}[place]
    generate_latents, write_video = generate.generate_latents, generate.write_video

    def generate_or_die(p: schema.Params, jobs: list[generate.VideoJob], *given: object) -> Iterator[torch.Tensor]:
        if jobs[0].system:
            if len(made) == die_at[0]:
                raise KeyboardInterrupt
            made.append([job.file for job in jobs])
        return generate_latents(p, jobs, *given)  # type: ignore[arg-type]

    def write_or_die(path: Path, frames: Iterator[np.ndarray], **given: object) -> None:
        def torn() -> Iterator[np.ndarray]:
            for number, frame in enumerate(frames):
                if len(written) == die_at[1] and number == 3:
                    raise KeyboardInterrupt
                yield frame

        write_video(path, torn(), **given)  # type: ignore[arg-type]
        written.append(path)

    def run(name: str) -> dict[str, bytes]:
        work, out = tmp_path / name, tmp_path / f"{name}-out"
        work.mkdir(exist_ok=True)
        assert generate.run(params, Track("generate", work), **project, out=out) == {"videos": 12.0}
        return {file.relative_to(out).as_posix(): file.read_bytes() for file in out.rglob("*") if file.is_file()}

    monkeypatch.setattr(generate, "generate_latents", generate_or_die)
    monkeypatch.setattr(generate, "write_video", write_or_die)
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    # six real clips, then batches of stage2's videos; the file that was being written is not there
    there = sorted((tmp_path / "killed").rglob("*.mp4"))
    assert sorted(written) == there and len(there) == {"between two batches": 10, "within a batch": 9}[place]
    begun, die_at = len(made), (99, 99)
    resumed = run("killed")
    again = made[begun:]
    assert [len(batch) for batch in again] == {"between two batches": [2], "within a batch": [2, 2]}[place]
    made.clear()
    whole = run("whole")
    assert len(made) == 3 and again == made[3 - len(again) :], "what was complete is not made again"
    assert len(whole) == 21 and resumed == whole


def test_what_stands_beside_the_students_continues_the_first_of_their_clips(stated: schema.Params, project: dict[str, Path]) -> None:
    some = {"prompts": 1, "continued": 3, "continued_beside": 2, "frames": 9, "prefix": 3, "systems": {}}
    params = stated.model_copy(update={"generate": stated.generate.model_copy(update=some)})
    jobs = [job for job in generate.list_jobs(params.generate, Latents(project["latents"])) if job.suite == "continuations" and job.system]
    numbers = {name: [job.number for job in jobs if job.name == name] for name in {job.name for job in jobs}}
    beside = ("causal_init", "stage1_without_slow", "stage2_without_slow")
    assert {*beside, "stage1", "stage2"} <= numbers.keys()
    assert all(found == ([0, 1] if name in beside else [0, 1, 2]) for name, found in numbers.items())
    assert [*generate.list_students(params)] == ["stage1", "stage2"], "an empty slow part has no worth to measure"
