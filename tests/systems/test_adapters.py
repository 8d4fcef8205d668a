"""Each adapter with a small random model of its class: the videos that come, their lengths, seeds, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cf_model.systems import adapters
from cf_model.systems.system_facts import ADAPTERS, SYSTEMS, write_table
from tests.folders import SIZE, pipeline
from tests.once import made_once
from tests.systems.small_pipelines import BUILDERS, write_pipeline

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = {"height": 32, "width": 32, "num_inference_steps": 2}
LONG: dict[str, Any] = {"skyreels-v2": {"base_num_frames": 17, "overlap_history": 5}, "framepack-f1": {"latent_window_size": 3}}
ASKED = {  # seconds, and the frames that come: the nearest that the codec, or FramePack's window, can make
    "wan2.1": (1.0, 17), "skyreels-v2": (1.4, 33), "anyflow-far": (1.0, 17), "ltx-video": (1.0, 25), "framepack-f1": (0.8, 25),
}  # fmt: skip


def test_every_pipeline_has_a_small_one() -> None:
    assert set(BUILDERS) == {name for name, one in SYSTEMS.items() if one.adapter == "diffusers"} == set(ASKED)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_pipeline_of_diffusers_makes_videos(name: str, tmp_path: Path) -> None:
    """Of the length that was asked for; one seed gives one video, also where a pipeline draws noise beside its generator."""
    folder = made_once(f"small-{name}", lambda folder: write_pipeline(name, folder)) / "pipeline"
    system = adapters.open_system(name, folder, CPU, SMALL | LONG.get(name, {}))
    seconds, frames = ASKED[name]
    image = None
    if name == "framepack-f1":
        image = tmp_path / "first.png"
        Image.new("RGB", (64, 48), (200, 30, 30)).save(image)
    made = [system.make_video("a red disc", seconds=seconds, seed=seed, image=image) for seed in (0, 0, 1)]
    assert made[0].shape == (frames, 32, 32, 3) and system.count_frames(seconds) == frames and made[0].std() > 1
    assert (made[0] == made[1]).all() and (made[0] != made[2]).any()
    about = system.describe()
    assert about["pipeline"] == SYSTEMS[name].pipeline and about["num_inference_steps"] == 2
    if name == "skyreels-v2":
        assert system.pipeline.scheduler.config.flow_shift == about["flow_shift"] == 8.0  # type: ignore[attr-defined]
        assert system.fps == 24 and about["addnoise_condition"] == 20


def test_a_model_of_ours_is_opened_under_any_name(tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.save_pretrained(tmp_path / "model")
    assert adapters.identify_system("mine", tmp_path / "model") == (None, 16)
    system = adapters.open_system("mine", tmp_path / "model", CPU, {})
    video = system.make_video("a red disc", seconds=0.6, seed=3)
    assert video.shape == (system.count_frames(0.6), SIZE, SIZE, 3) and (video == pipe("a red disc", seconds=0.6, seed=3)).all()
    with pytest.raises(ValueError, match=r"--set changes a pipeline of diffusers, and .* is a model of this project"):
        adapters.open_system("mine", tmp_path / "model", CPU, {"num_inference_steps": 2})


def test_chunks_of_anyflow_go_on_after_those_it_was_trained_with() -> None:
    class Transformer:
        class config:
            chunk_partition = (1, 3, 3)

    class Pipeline:
        transformer = Transformer

    one = object.__new__(adapters.DiffusersSystem)
    one.pipeline = Pipeline
    assert [one.split_latents(latents) for latents in (1, 4, 7, 9)] == [[1], [1, 3], [1, 3, 3], [1, 3, 3, 2]]


@pytest.mark.parametrize(
    ("name", "index", "sentence"),
    [
        ("magi-1", None, "magi-1 makes no videos here: its videos are made by its own code; score them by `cf score"),
        ("causvid", None, "causvid makes no videos here: only printed numbers of it are here"),
        ("other", None, "other makes no videos here: .* is no model of this project, and pipelines of diffusers are ltx-video, wan2.1"),
        ("wan2.1", None, "holds no model_index.json, and wan2.1 needs a WanPipeline: Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        ("wan2.1", '{"_class_name": "LTXPipeline"}', "holds LTXPipeline, and wan2.1 needs a WanPipeline"),
        ("wan2.1", "[", "model_index.json is not a JSON object; copy or make it again"),
    ],
)
def test_what_makes_no_videos_is_refused(name: str, index: str | None, sentence: str, tmp_path: Path) -> None:
    if index:
        (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(ValueError, match=sentence):
        adapters.identify_system(name, tmp_path)


def test_the_page_has_the_table_of_the_code() -> None:
    text = (ROOT / "docs/systems.md").read_text()
    assert write_table() in text and all(f"`{adapter}`: {words}" in text for adapter, words in ADAPTERS.items())


def test_every_licence_is_named_and_what_is_not_free_is_not_run() -> None:
    assert all(one.licence for one in SYSTEMS.values())
    assert {one.adapter for one in SYSTEMS.values() if "NC" in one.licence} == {"published"}
    assert np.all([one.pipeline is not None for one in SYSTEMS.values() if one.adapter == "diffusers"])
