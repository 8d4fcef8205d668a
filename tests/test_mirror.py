"""What W&B is told, read back from its own files: names, origin, lineage, videos, tables; and that it never ends a stage."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import offline
import pytest
from evaluate.project import write_mp4

from cf_model.evaluate import excerpt
from tasks.files.hashes import compute_dvc_md5
from tasks.files.json_lines import read_json_lines
from tasks.params.project import Project
from tasks.runner import track as tracking
from tasks.wandb_log import run as mirror

MADE = "out.mkdir(parents=True); return {}"
SECRET = "5ec2e7" * 7  # as long as a key of W&B


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(offline.project(tmp_path))
    for name in ("CF_RUN", "DVC_EXP_NAME", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_run_and_its_origin(here: Path) -> None:
    """Group, job type, a name for people; parameters, commit and DVC's md5s; values, summary, exit code."""
    done = offline.stage(
        here, "encode", "data/latents", """
            out.mkdir(parents=True)
            (out / "clip.safetensors").write_text("latents")
            track.log(10, loss=0.5)
            track.log(20, loss=0.25)
            return {"psnr": 28.5}
        """,
        WANDB_API_KEY=SECRET,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = (run.folder for run in offline.runs(here))
    run = offline.described(folder)
    assert (run["run_group"], run["job_type"], run["display_name"], run["project"]) == ("nightly-7", "encode", "encode nightly-7", "toy")
    assert run["run_id"].startswith("nightly-7-encode-1-") and run["tags"] == ["profile tiny"]
    config = run["config"]["update"]
    sha = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert config["git"] == {"sha": sha, "dirty": False} and config.get("resume_of") is None
    assert config["dvc"] == {"stage": "encode", "deps": {"data/clips": compute_dvc_md5(Path("data/clips"))}}
    assert config["seed"] == 0 and config["evaluate"] == {"resamples": 100}
    assert offline.records(folder, "stats") == [], "the machine is in runtime/"
    told_by_wandb = [run, *offline.records(folder, "environment")]
    assert not any({"git", "code_path"} & set(record) for record in told_by_wandb), "ours says it once, and what is changed"
    (metric,) = offline.records(folder, "metric")
    assert (metric["glob_name"], metric["step_metric"]) == ("*", "step")
    rows = offline.history(folder)
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == [(10, 0.5), (20, 0.25)]
    told = offline.summary(folder)
    assert told["exit_code"] == 0 and told["summary"]["psnr"] == 28.5
    assert json.loads(Path("runtime/encode.json").read_text())["wandb"] == str(Path(folder).relative_to(here))
    for file in here.rglob("*"):  # nothing says where it may, and nothing says the key
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file
    assert SECRET not in done.stdout + done.stderr


def test_lineage_from_clips_to_report(here: Path) -> None:
    """Each stage's inputs are the versions that the stages before it made: same name, same digest. No file is copied."""
    chain = {"encode": "data/latents", "teacher": "models/teacher", "generate": "samples", "evaluate": "results"}
    write = 'out.mkdir(parents=True); (out / "metrics.jsonl").write_text(str(out)); return {"files": 1}'
    for name, out in chain.items():
        assert offline.stage(here, name, out, write).returncode == 0
    assert offline.stage(here, "report", "reports/report.html", 'out.write_text("page"); return {"files": 1}').returncode == 0
    made: dict[str, str] = {}
    drawn = []
    for folder in (run.folder for run in offline.runs(here)):
        stage = offline.described(folder)["job_type"]
        for one in offline.records(folder, "artifact"):
            told = json.loads(one["metadata"])
            assert told["dvc_md5"] == compute_dvc_md5(Path(told["dvc_path"]))
            assert all("local_path" not in entry and entry["ref"].startswith("file://") for entry in one["manifest"]["contents"])
            if one.get("use_after_commit"):
                drawn.append((one["name"], stage))
                assert made.get(one["name"], one["digest"]) == one["digest"]
            else:
                made[one["name"]] = one["digest"]
                assert told["git_sha"] and told["stage"] == stage and set(one["aliases"]) == {"latest", "nightly-7"}
    assert list(made) == ["latents", "teacher", "samples", "results", "report"]
    assert drawn == [
        ("clips", "encode"), ("latents", "teacher"), ("teacher", "generate"), ("latents", "generate"), ("samples", "evaluate"),
        ("results", "report"), ("teacher", "report"),
    ]  # fmt: skip


def test_a_group_that_is_no_alias(here: Path) -> None:
    """W&B takes / and : in the name of a group, and in an alias neither."""
    done = offline.stage(here, "encode", "data/latents", "out.mkdir(parents=True); return {}", CF_RUN="lab/exp:1")
    assert "did not get" not in done.stderr
    (folder,) = (run.folder for run in offline.runs(here))
    made = offline.records(folder, "artifact")
    assert offline.described(folder)["run_group"] == "lab/exp:1"
    assert [sorted({*one["aliases"]} - {"latest"}) for one in made] == [["lab-exp-1"]] * 2


def samples(root: Path) -> Path:
    rows = []
    for system in ("stage1", "stage2"):
        for k in range(6):
            for seed in (3, 4):
                row = {"suite": "prompts", "system": system, "prompt": f"prompt {k}", "seed": seed, "file": f"{system}/{k}-s{seed}.mp4"}
                rows.append(row)
                write_mp4(root / row["file"], np.full((3, 32, 32, 3), 40 * k, np.uint8))
    (root / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_videos_and_the_table_have_the_same_keys_in_every_run(here: Path) -> None:
    samples(here / "given")
    cells = [
        {"suite": "prompts", "system": s, "metric": "motion", "prompt": f"p{k}", "clip": None, "seed": 0, "value": k + place}
        for place, s in enumerate(("stage1", "stage2"))
        for k in range(5)
    ]
    (here / "cells.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    generate = 'import shutil; shutil.copytree("given", out); return {"videos": 24}'
    evaluate = """
        out.mkdir(); (out / "cells.jsonl").write_text(open("cells.jsonl").read())
        return {"prompts": {"stage1": {"motion": 2.0, "diversity": 40.0}}, "compared": {"a to b": {"before": 1.0}}}
    """
    for name, out, body in (("generate", "samples", generate), ("evaluate", "results", evaluate)):
        done = offline.stage(here, name, out, body)
        assert done.returncode == 0 and "did not get" not in done.stderr, done.stderr
    first, second = (run.folder for run in offline.runs(here))
    (row,) = offline.history(first)
    for system in ("stage1", "stage2"):
        assert row[f"videos/prompts/{system}._type"] == "videos" and row[f"videos/prompts/{system}.count"] == excerpt.MOST_VIDEOS
        assert row[f"videos/prompts/{system}.captions"] == [f"prompt {k} (seed 3)" for k in range(4)]
    assert len(list(Path(first).rglob("*.mp4"))) == 8
    (file,) = Path(second).glob("files/media/table/*.table.json")
    table = json.loads(file.read_text())
    assert tuple(table["columns"]) == excerpt.TABLE_COLUMNS
    by = {tuple(line[:3]): line[3:] for line in table["data"]}
    assert list(by) == [("prompts", "stage1", "diversity"), ("prompts", "stage1", "motion"), ("prompts", "stage2", "motion")]
    assert by["prompts", "stage1", "diversity"] == [40, None, None, None]
    mean, low, high, videos = by["prompts", "stage1", "motion"]
    assert mean == 2 and low < 2 < high and videos == 5


def test_media_while_a_stage_runs(here: Path) -> None:
    """The file may go as soon as it is shown."""
    write_mp4(here / "given.mp4", np.zeros((3, 32, 32, 3), np.uint8))
    body = """
        import shutil; shutil.copy("given.mp4", "sample.mp4")
        track.log(5, loss=1.0)
        track._mirror.show(5, {"samples/0": Path("sample.mp4")}, {"samples/0": "a red disc"})
        Path("sample.mp4").unlink()
        out.mkdir(parents=True); return {}
    """
    assert offline.stage(here, "teacher", "models/teacher", body).returncode == 0
    (folder,) = (run.folder for run in offline.runs(here))
    (row,) = [row for row in offline.history(folder) if "samples/0._type" in row or "samples/0.count" in row]
    assert row["step"] == 5 and len(list(Path(folder).rglob("*.mp4"))) == 1


def test_sigterm_ends_the_run_with_143(here: Path) -> None:
    done = offline.stage(here, "teacher", "models/teacher", "track.log(1, loss=1.0); os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)")
    assert done.returncode == 143
    (folder,) = (run.folder for run in offline.runs(here))
    told = offline.summary(folder)
    assert (told["exit_code"], told["state"]) == (143, "failed")


def test_attempts_are_linked(here: Path) -> None:
    fail = "track.log(1, loss=1.0); raise OSError('disk')"
    for body in (fail, fail, MADE, MADE):
        offline.stage(here, "teacher", "models/teacher", body)
    runs = offline.runs(here)
    assert [offline.summary(run.folder)["exit_code"] for run in runs] == [1, 1, 0, 0]
    told = [offline.described(run.folder) for run in runs]
    assert [run["config"]["update"].get("resume_of") for run in told] == [None, runs[0].id, runs[1].id, None]
    assert [run["config"]["update"]["attempt"] for run in told] == [1, 2, 3, 1]
    assert told[2]["display_name"] == "teacher nightly-7, attempt 3" and told[3]["display_name"] == "teacher nightly-7"


def test_the_last_attempt_has_all_steps(here: Path) -> None:
    """An attempt is killed in W&B's last seconds, and after its checkpoint at step 20, and its W&B folder is deleted: the next one logs
    the steps until there again, with their times and videos, and goes on."""
    write_mp4(here / "given.mp4", np.zeros((3, 32, 32, 3), np.uint8))
    first = """
        for step in (10, 20, 30):
            track.log(step, loss=1 / step)
            track.time(step, {"step": step / 10})
            track.show(step, {"samples/0": Path("given.mp4")}, {"samples/0": "a red disc"})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    then = "track.resumed(20); track.log(30, loss=0.5); out.mkdir(parents=True); return {}"
    assert offline.stage(here, "teacher", "models/teacher", first).returncode == -9
    (killed,) = offline.runs(here)
    assert killed.state == "empty"
    shutil.rmtree(killed.folder)
    assert offline.stage(here, "teacher", "models/teacher", then).returncode == 0
    (whole,) = offline.runs(here)
    assert whole.state == "waits"
    rows = offline.history(whole.folder)
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == [(10, 0.1), (20, 0.05), (30, 0.5)]
    assert [(row["step"], row["seconds/step"]) for row in rows if "seconds/step" in row] == [(10, 1), (20, 2)]
    assert [row["step"] for row in rows if "samples/0._type" in row] == [10, 20]
    assert [row["step"] for row in rows] == [10, 10, 10, 20, 20, 20, 30]


@pytest.mark.parametrize(
    ("stated", "environment", "mode"),
    [("off", "", None), ("offline", "", "offline"), ("offline", "disabled", None), ("off", "online", "online")],
)
def test_the_environment_has_the_last_word(
    stated: str, environment: str, mode: str | None, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", environment)
    monkeypatch.setattr(mirror.WandbRun, "start", lambda self: None)
    (here / "work").mkdir()
    project = Project()
    project.tree, project.params = {}, cast(Any, SimpleNamespace(tracking=SimpleNamespace(wandb=stated, project="toy")))
    tracked = mirror.start_run("toy", project, here / "work")
    assert (tracked.mode if tracked else None) == mode


def test_rows_without_a_mirror(tmp_path: Path) -> None:
    track = tracking.Track("toy", tmp_path)
    track.log(1, loss=1.0)
    track.close({"loss": 1.0})
    assert "wandb" not in track.facts


def test_without_a_connection_it_is_written_offline(here: Path) -> None:
    """Online was asked for, and nobody listens there (no key either): the stage goes on, `cf wandb sync` sends it later."""
    done = offline.stage(here, "teacher", "models/teacher", MADE, WANDB_MODE="online", WANDB_BASE_URL="http://127.0.0.1:9")
    assert done.returncode == 0 and "this run is written offline" in done.stderr
    (folder,) = (run.folder for run in offline.runs(here))
    assert folder.name.startswith("offline-") and folder.name.endswith("-offline") and offline.summary(folder)["exit_code"] == 0


def test_no_key_in_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    assert mirror.describe_error(ValueError(f"{SECRET} is\n refused")) == "WANDB_API_KEY is refused"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("import psutil; [c.kill() for c in psutil.Process().children(recursive=True)]", "W&B stopped working"),
        ("mirror.build_artifact = None", "W&B did not get the out"),
    ],
)
def test_a_broken_tracker_never_ends_a_stage(here: Path, body: str, says: str) -> None:
    body += "\ntrack.log(1, loss=1.0)\ntrack.log(2, loss=1.0)\nout.mkdir(parents=True)\ntrack.save(out)\nreturn {'loss': 1.0}"
    done = offline.stage(here, "teacher", "models/teacher", body)
    assert done.returncode == 0 and says in done.stderr
    assert [row["step"] for row in read_json_lines(here / "models/teacher/metrics.jsonl")] == [1, 2]
