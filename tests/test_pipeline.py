"""The smoke profile for real, once: every stage through DVC, a second run, a kill in mid-training, a changed parameter."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from cf_model.data.latents import Latents
from cf_model.model import wan
from cf_model.sample_videos import SampleWriter
from cf_model.train.trainer.samples import sample_continuation, sample_from_noise, sample_stream
from tasks.params import load
from tasks.runner.track import Track
from tests.preloaded import python_folder

ROOT = Path(__file__).parent.parent
STAGES = list(YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"])
FEWER = {  # videos than the profile has; each kind is made by the same code however many there are, and .ci/run makes all of them
    "  prompts: 2\n  continued: 2\n": "  prompts: 1\n  continued: 1\n",
    "recall: {clips: 2,": "recall: {clips: 1,",
}
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}


def dvc(folder: Path, *words: str) -> str:
    """DVC, and with it the stages, with libraries that are loaded already."""
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = ENVIRONMENT | {"PATH": f"{python_folder()}{os.pathsep}{ENVIRONMENT['PATH']}"}
    done = subprocess.run([python_folder() / "python", "-m", "dvc", *words], cwd=folder, env=environment, **both)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def ran(said: str) -> list[str]:
    return [stage for stage in STAGES if f"Running stage '{stage}'" in said]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tree as it is, with the smoke profile, run from nothing."""
    folder = lay_out(tmp_path_factory.mktemp("smoke") / "project")
    assert ran(dvc(folder, "repro")) == STAGES
    yield folder


def lay_out(folder: Path) -> Path:
    """The tree as it is, in git, with the smoke profile but fewer videos, and nothing made yet."""
    files = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, files.stdout.split("\0")):
        if (ROOT / name).is_file() and name != "dvc.lock" and not name.startswith("metrics/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "tree"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    use = [python_folder() / "python", "-m", "tasks", "profile", "use", "smoke"]
    subprocess.run(use, cwd=folder, env=ENVIRONMENT, check=True, capture_output=True)
    replace_all(folder / "params.yaml", FEWER)
    return folder


def replace_all(file: Path, changes: dict[str, str]) -> None:
    text = file.read_text()
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after)
    file.write_text(text)


def test_everything_is_there(project: Path) -> None:
    for stage in STAGES[1:]:
        assert json.loads((project / f"metrics/{stage}.json").read_text()) is not None
    page = (project / "reports/report.html").read_text()
    assert "<video" in page and "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    index = [json.loads(line) for line in (project / "samples/index.jsonl").read_text().splitlines()]
    assert all((project / "samples" / row["file"]).stat().st_size > 500 for row in index)
    assert {row["system"] for row in index} >= {"real", "base", "causal_init", "stage1", "stage2", "teacher_slow_fast", "teacher_fast"}


def test_the_last_samples_are_by_the_weights_that_were_saved(project: Path, tmp_path: Path) -> None:
    """Made again from every training stage's out, which is the averaged model: the same files."""
    p, clips = load.load_params(project / "params.yaml"), Latents(project / "data/latents")
    null, flow = clips.null_text, p.flow
    makes: dict[str, Any] = {
        "base": partial(sample_from_noise, spec=p.samples.base, flow=flow, null=null),
        "teacher": partial(sample_continuation, spec=p.samples.teacher, view=p.teacher.view, flow=flow, null=null),
    }
    for stage, chunk in (("causal_init", p.causal_init.chunk), ("stage1", p.stage1.rollout.chunk), ("stage2", p.stage2.rollout.chunk)):
        plan, memory = getattr(p.samples, stage), getattr(p, stage).memory
        makes[stage] = partial(sample_stream, spec=plan, levels=p.stage1.rollout.levels, chunk=chunk, memory=memory, flow=flow)
    for stage, make in makes.items():
        plan, steps = getattr(p.samples, stage), getattr(p, stage).steps
        names = [f"step-{n:06d}-0.mp4" for n in range(plan.every, steps + 1, plan.every)]
        assert steps % plan.every == 0 and sorted(file.name for file in (project / f"models/{stage}/samples").iterdir()) == names
        (tmp_path / stage).mkdir()
        model = wan.load_transformer(project / "models" / stage, p.compute)
        SampleWriter(plan, Track(stage, tmp_path / stage), clips, project / "models/codec", partial(make, model))(steps)
        made, kept = tmp_path / stage / "samples" / names[-1], project / f"models/{stage}/samples/{names[-1]}"
        assert made.read_bytes() == kept.read_bytes()
        rows = (project / f"runtime/{stage}.timing.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == list(range(1, steps + 1))


def test_every_planted_clip_is_caught_and_no_good_one_lost(project: Path) -> None:
    planted = {row["id"]: row["planted"] for row in map(json.loads, (project / "data/clips/clips.jsonl").read_text().splitlines())}
    kept = {row["id"]: row["kept"] for row in map(json.loads, (project / "data/manifest.jsonl").read_text().splitlines())}
    wrong = {clip: planted[clip] for clip in kept if kept[clip] == bool(planted[clip])}
    # a duplicate and its original are the same picture: either may go, one must
    twins = [clip for clip in wrong if planted[clip] in (None, "duplicate")]
    assert set(wrong) == set(twins) and len(twins) in (0, 2)


def test_a_second_run_runs_nothing(project: Path) -> None:
    assert ran(dvc(project, "repro")) == []


def test_another_teacher_context_reruns_stage2_and_what_follows(project: Path) -> None:
    yaml, file = YAML(), project / "params.yaml"
    before = file.read_text()
    stated = yaml.load(before)
    stated["stage2"]["teacher"]["context"] = "none"
    yaml.dump(stated, file)  # what `dvc exp run -S stage2.teacher.context=none` does first
    try:
        assert ran(dvc(project, "repro")) == ["validate", "stage2", "generate", "evaluate", "report"]
    finally:
        file.write_text(before)
    # validate has nothing to cache; everything else comes back from the run cache
    assert ran(dvc(project, "repro")) == ["validate"]


def test_killed_in_the_middle_of_stage2_ends_with_the_same_bytes(project: Path) -> None:
    before = (project / "dvc.lock").read_bytes()
    process = subprocess.Popen(
        ["dvc", "repro", "--single-item", "--force", "stage2"],
        cwd=project,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and rows(project) < 3:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert rows(project) >= 3, "stage2 was not in the middle of its steps when it was killed"
    said = dvc(project, "repro", "--single-item", "--force", "stage2")
    assert "stage2: continues after step" in said
    assert (project / "dvc.lock").read_bytes() == before
    steps = [json.loads(line)["step"] for line in (project / "models/stage2/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert json.loads((project / "runtime/stage2.json").read_text())["resumed_at"] in (2, 4)


def rows(project: Path) -> int:
    files = list((project / "work/stage2").glob("*/metrics.jsonl"))
    return max((len(file.read_text().splitlines()) for file in files), default=0)
