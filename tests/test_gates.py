"""What the committed run of profile tiny promises: it learned, and it is a run of this code with these parameters.

The thresholds are the project's goals, set before the run (means over at least 16 prompts). A change of code or
parameters without a new run is as red as a goal that was missed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tasks.files.hashes import compute_dvc_md5
from tasks.params import yaml_file

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "dvc.lock"


@pytest.fixture(scope="module", autouse=True)
def committed() -> None:
    if yaml_file.read_yaml(ROOT / "params.yaml")["profile"] != "tiny":
        pytest.skip("params.yaml holds another profile; the promises are tiny's")


def measured(stage: str) -> Any:
    return json.loads((ROOT / f"metrics/{stage}.json").read_text())


@pytest.fixture(scope="module")
def prompts() -> Any:
    return measured("evaluate")["prompts"]


@pytest.fixture(scope="module")
def continuations() -> Any:
    return measured("evaluate")["continuations"]


def test_at_least_16_prompts(prompts: Any, continuations: Any) -> None:
    assert all(system["videos"] >= 16 for system in [*prompts.values(), *continuations.values()])


@pytest.mark.parametrize(("metric", "goal"), [("compass_coherence", 0.9), ("sky_accuracy", 0.95), ("sprite_recall", 0.8)])
def test_base_shows_what_the_caption_says(prompts: Any, metric: str, goal: float) -> None:
    assert prompts["base"][metric] > goal


def test_stage1_makes_the_causal_student_sharp_and_obedient(prompts: Any) -> None:
    before, after, real = prompts["causal_init"], prompts["stage1"], prompts["real"]
    assert after["sprite_recall"] >= min(before["sprite_recall"] + 0.25, 0.95)
    assert abs(after["sharpness"] / real["sharpness"] - 1) <= 0.2


def test_the_teacher_remembers_what_the_fast_part_alone_can_not() -> None:
    found = measured("evaluate")["compared"]["map_error: teacher_fast to teacher_slow_fast"]
    assert found["videos"] >= 16, "as many videos as prompts, each with content that was out of sight for more than 5 s"
    assert found["after"] <= 0.8 * found["before"]


def test_stage2_goes_on_from_real_clips_better_than_stage1(prompts: Any) -> None:
    """On held-out worlds. README says which settings were measured on these worlds before the committed one."""
    for metric in ("map_error", "map_error_absent"):
        found = measured("evaluate")["compared"][f"{metric}: stage1 to stage2"]
        assert found["videos"] >= 64, metric
        assert found["high"] < 0, metric
    found = measured("evaluate")["compared"]["map_error: stage1 to stage2"]
    assert found["after"] <= 0.8 * found["before"], "lower by a fifth"
    before, after, real = prompts["stage1"], prompts["stage2"], prompts["real"]
    assert after["other_heading"] >= before["other_heading"], "contrast within a video"
    assert after["diversity"] >= 0.85 * before["diversity"]
    assert after["sprite_recall"] >= 0.93
    assert abs(after["speed"] / real["speed"] - 1) <= 0.3


def test_the_codec_looks_like_the_clip() -> None:
    assert measured("codec")["psnr"] >= 30


def test_videos_move_in_every_frame_and_not_from_latent_to_latent(prompts: Any) -> None:
    """1 is even motion; a codec that shows a latent's four frames as one picture has a stutter of 30."""
    assert measured("codec")["stutter"] <= 1.5
    for system in ("real", "stage1", "stage2"):
        assert prompts[system]["stutter"] <= 1.5, system


def test_every_planted_clip_was_caught_and_no_good_one_lost() -> None:
    stated, found = yaml_file.read_yaml(ROOT / "params.yaml")["clips"], measured("filter")
    assert found["kept"] == stated["count"]
    assert found["clips"] - found["kept"] == 7 * stated["bad"]


def test_the_run_is_of_this_code_and_these_parameters() -> None:
    stages = yaml_file.read_yaml(LOCK)["stages"]
    assert set(stages) == set(yaml_file.read_yaml(ROOT / "dvc.yaml")["stages"])
    stated = yaml_file.read_yaml(ROOT / "params.yaml")
    for name, stage in stages.items():
        for dep in stage.get("deps", []):
            if dep["path"].startswith(("cf_model", "tasks")):
                assert dep["md5"] == compute_dvc_md5(ROOT / dep["path"]), f"{dep['path']} changed after {name} ran; run make repro"
        for key, value in stage.get("params", {}).get("params.yaml", {}).items():
            assert value == yaml_file.value_at(stated, key), f"{key} changed after {name} ran; run make repro"


def test_the_metrics_are_those_of_the_lock() -> None:
    for name, stage in yaml_file.read_yaml(LOCK)["stages"].items():
        for out in stage.get("outs", []):
            if out["path"].startswith("metrics/"):
                assert out["md5"] == hashlib.md5((ROOT / out["path"]).read_bytes()).hexdigest(), name
