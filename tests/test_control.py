"""`cf control`: the memoryless control shares all that comes before stage 2, and is compared video by video."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tasks.commands import control
from tasks.params.yaml_file import Refused, read_yaml

ROOT = Path(__file__).parent.parent


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for path in control.NEEDED:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch() if file.suffix else file.mkdir()
    shutil.copyfile(ROOT / "profiles/tiny.yaml", tmp_path / "params.yaml")
    shutil.copyfile(ROOT / "dvc.yaml", tmp_path / "dvc.yaml")
    write_cells(tmp_path, {"stage1": 50.0, "stage2": 30.0})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_cells(folder: Path, errors: dict[str, float]) -> None:
    """A map error for each of twelve continued clips; the clips differ more than the systems."""
    rows = []
    for system, error in errors.items():
        for n in range(12):
            file = f"continuations/{system}/{n:05d}-s0.mp4"
            key = {"suite": "continuations", "system": system, "prompt": f"p{n}", "clip": f"c{n}", "seed": 0, "file": file}
            rows.append(key | {"metric": "map_error_absent", "value": error + 10 * n})
    (folder / "results").mkdir(parents=True, exist_ok=True)
    (folder / "results/cells.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_only_the_teachers_context_differs(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[tuple[str, dict[str, Path]]] = []

    def run_stage(folder: Path, stage: str, **paths: Path) -> None:
        ran.append((stage, paths))
        if stage == "evaluate":
            write_cells(folder, {"stage2": 45.0})

    monkeypatch.setattr(control, "run_stage", run_stage)
    control.main([])
    folder = project / control.FOLDER
    stated, changed = read_yaml(project / "params.yaml"), read_yaml(folder / "params.yaml")
    assert changed["stage2"]["teacher"].pop("context") == "none" != stated["stage2"]["teacher"].pop("context")
    assert changed["stage2"] == stated["stage2"] and changed["generate"]["systems"].keys() == {"stage2"}
    assert [stage for stage, _ in ran] == ["stage2", "generate", "evaluate"]
    made = {name: path for _, paths in ran for name, path in paths.items() if folder in path.parents}
    assert set(made) == {"out", "stage2", "samples"}, "all else is the run's own"
    assert ran[0][1]["student"] == project / "models/stage1"
    (row,) = json.loads((folder / "compared.json").read_text())
    found: dict[str, Any] = {"context": 85.0, "memoryless": 100.0, "difference": -15.0, "low": -15.0, "high": -15.0, "says": "better"}
    assert row == {"suite": "continuations", "metric": "map_error_absent", "prompts": 12} | found
    said = capsys.readouterr().out
    assert "map_error_absent" in said and "n =  12 better" in said


def test_a_run_comes_first(project: Path) -> None:
    (project / "results/cells.jsonl").unlink()
    with pytest.raises(Refused, match=r"no results/cells\.jsonl; run `make repro` first"):
        control.main([])
