"""The whole pipeline in smoke size on a folder of real clips: every stage runs, and the report shows their frames."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tasks.params.yaml_file import read_yaml, write_yaml
from tests.test_pipeline import STAGES, dvc, lay_out, ran

CLIPS = Path(__file__).parents[2] / "shared" / "clips"
REAL = ("mixkit-*.mp4", "flipping_a_pancake.mkv", "nasa_13013.mp4")  # four of 5 s at 832x480, two of more than 10 s


def relax_rules(params: Path) -> None:
    """Take the folder raw, clips of 5 s, one with a cut, and one word of a caption; ask for as few clips as there are."""
    tree = read_yaml(params)
    tree["start"]["clips"] = "raw"
    tree["clips"] |= {"source": "folder", "folder": "raw"}
    tree["filter"] |= {"min_seconds": 4.0, "max_cut": 100.0, "min_words": 1, "heldout": 1}
    tree["codec"]["clips"] = 4
    tree["causal_init"]["longest"] = 18  # the longest training clip has 41 latents, the longer one is held out
    tree["generate"] |= {"prompts": 1, "continued": 1, "frames": 36}
    tree["generate"]["recall"]["clips"] = 1
    for system in tree["generate"]["continuations"].values():
        system["frames"] = 36
    write_yaml(params, tree)


@pytest.mark.slow
@pytest.mark.skipif(not CLIPS.is_dir(), reason="needs ../shared/clips")
def test_the_pipeline_runs_on_real_clips(tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "project")
    (folder / "raw").mkdir()
    for file in (file for pattern in REAL for file in sorted(CLIPS.glob(pattern))):
        shutil.copyfile(file, folder / "raw" / file.name)
    relax_rules(folder / "params.yaml")
    assert ran(dvc(folder, "repro")) == STAGES
    manifest = [json.loads(line) for line in (folder / "data/manifest.jsonl").read_text().splitlines()]
    assert len(manifest) == 6 and {"flipping_a_pancake.mkv", "nasa_13013.mp4"} <= {row["source"] for row in manifest if row["kept"]}
    [held] = [row for row in manifest if row["split"] == "heldout"]
    report = (folder / "reports/report.html").read_text()
    assert held["caption"] in report and "<video" in report
