"""Training curves that leave their bounds: named once, by name and value, while it happens and afterwards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cf_model import sample_videos
from cf_model.codec.codec_file import save_codec
from cf_model.codec.linear import LinearCodec
from cf_model.data.video import measure_clipped_share
from cf_model.evaluate.trouble import CurveRule, find_troubles
from cf_model.model.memory import ChunkComparison
from cf_model.train.trainer.loop import fit
from cf_model.train.trainer.observe import measure_promotion, read_values
from tasks.params import load
from tasks.runner.track import Track
from tests.small import SHAPE, normal, spec
from tests.train import ranked

ROOT = Path(__file__).parent.parent.parent
DIVERGES = CurveRule(curve="critic_loss", above=3.0, below=None, steps=3, means="the critic diverges")
SILENT = CurveRule(curve="promotion", above=None, below=0.01, steps=2, means="nothing is promoted")


def rows(**curves: list[float]) -> list[dict[str, float]]:
    count = len(next(iter(curves.values())))
    return [{"step": n + 1} | {name: values[n] for name, values in curves.items()} for n in range(count)]


def test_a_curve_above_its_bound_is_named_with_its_value_and_step():
    """As stage 1 at 50 times its learning rate: 0.44, then 12,700."""
    (said,) = find_troubles(rows(critic_loss=[0.44, 0.5, 0.6, 9.0, 12700.0, 12700.0]), [DIVERGES])
    assert said == "critic_loss is 3.36667 at step 4 (mean of 3), above 3: the critic diverges"


def test_a_mean_is_watched_and_not_a_single_step():
    assert find_troubles(rows(critic_loss=[0.4, 8.0, 0.4, 0.4, 8.0, 0.4]), [DIVERGES]) == []
    assert find_troubles(rows(critic_loss=[9.0, 9.0]), [DIVERGES]) == [], "too few steps to say"


def test_below_and_off():
    nothing = rows(promotion=[0.5, 0.2, 0.0, 0.0, 0.0])
    (said,) = find_troubles(nothing, [SILENT])
    assert said.startswith("promotion is 0 at step 4 (mean of 2), below 0.01")
    assert find_troubles(nothing, [replace(SILENT, below=None)]) == [], "null: no bound"


def test_rows_without_the_curve_do_not_count():
    """The student's values stand in every third row only, and a bad step's value is null."""
    seldom = [{"step": n, "critic_loss": 9.0} if n % 3 == 0 else {"step": n, "critic_loss": None} for n in range(1, 10)]
    assert len(find_troubles(seldom, [DIVERGES])) == 1 and "step 9" in find_troubles(seldom, [DIVERGES])[0]


def test_a_run_says_it_once_and_a_resumed_run_does_not_say_it_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    track = Track("stage1", tmp_path, rules=[DIVERGES])
    for row in rows(critic_loss=[9.0] * 6):
        track.log(int(row["step"]), critic_loss=row["critic_loss"])
    said = capsys.readouterr().err
    assert said.startswith("stage1: critic_loss is 9 at step 3 (mean of 3), above 3: the critic diverges; docs/training.md, Trouble")
    assert said.count("\n") == 1, "once"
    again = Track("stage1", tmp_path, resume=True, rules=[DIVERGES])
    again.resumed(5)
    again.log(6, critic_loss=9.0)
    assert "critic_loss" not in capsys.readouterr().err
    earlier = Track("stage1", tmp_path, resume=True, rules=[DIVERGES])
    earlier.resumed(2)
    earlier.log(3, critic_loss=9.0)
    assert "critic_loss is 9 at step 3" in capsys.readouterr().err, "it had not happened before that checkpoint"


@pytest.mark.parametrize("profile", ["tiny", "smoke", "small", "wan-1.3b"])
def test_every_profile_watches_the_critic_and_the_memory(profile: str):
    watched = {rule.curve for rule in load.load_params(ROOT / f"profiles/{profile}.yaml").watch}
    assert {"critic_loss", "similarity/q50", "loss", "clipped"} <= watched


@pytest.mark.parametrize(("rule", "watched"), [("similarity", True), ("none", False), ("uniform", False)])
def test_equal_chunks_are_trouble_only_where_they_decide(rule: str, watched: bool) -> None:
    """A memory that never promotes, or promotes by number, loses nothing when neighbouring chunks are alike."""
    memory = spec(promote=rule, slow=0 if rule == "none" else 12)
    same = [ChunkComparison(torch.ones(2, 3), torch.zeros(2, 1, dtype=torch.bool) if rule != "none" else None)] * 4
    rows = [{"step": step, **read_values(measure_promotion(memory, same))} for step in range(1, 30)]
    assert all(row["similarity"] == 1 for row in rows), "it is logged all the same"
    found = find_troubles(rows, load.load_params(ROOT / "profiles/tiny.yaml").watch)
    assert [sentence.split()[0] for sentence in found] == (["similarity/q50"] if watched else [])


def test_samples_that_go_black_or_white_are_named_when_they_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A codec whose brightness is driven to the ends, as a diverged student's latents do."""
    written: list[np.ndarray] = []
    monkeypatch.setattr(sample_videos, "write_video", lambda path, frames, **more: written.append(np.stack(list(frames))))
    job, _ = ranked.base()
    codec = LinearCodec(SHAPE[0], 8)
    codec.decoder.copy_(normal(*codec.decoder.shape, seed=9) * 100)
    save_codec(codec, tmp_path / "codec")
    track = Track("base", tmp_path, rules=load.load_params(ROOT / "profiles/tiny.yaml").watch)
    sample = ranked.sampler(job, track, tmp_path / "codec", 2)
    job.steps, job.save_every = 3, 4
    fit(job, track, sample)
    logged = [json.loads(line) for line in track.curve.read_text().splitlines()]
    assert [row["step"] for row in logged] == [1, 2, 3] and [row["step"] for row in logged if "clipped" in row] == [2]
    assert logged[1]["clipped"] == pytest.approx(measure_clipped_share(np.concatenate(written)), abs=1e-6)
    assert len(written) == 2 and 0.1 < logged[1]["clipped"] < 1
    assert capsys.readouterr().err.startswith(f"base: clipped is {logged[1]['clipped']:.6g} at step 2 (mean of 1), above 0.1: the sample")
