"""Where stages begin is DVC's to know: ${start.NAME} in dvc.yaml is a dependency like any other, also in an experiment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.preloaded import python_folder

ROOT = Path(__file__).parent.parent
STAGE = f"{sys.executable} -c \"import shutil, sys; shutil.copytree(sys.argv[1], 'models/stage2')\" ${{start.stage2}}"


def run(*words: str, cwd: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "GIT_CONFIG_GLOBAL": os.devnull}
    python = [python_folder() / "python", "-m"] if words[0] == "dvc" else []
    done = subprocess.run([*python, *words], cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Our stage 2 as dvc.yaml has it, but for what it runs and the code that it depends on."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    yaml = YAML()
    tree = yaml.load(ROOT / "dvc.yaml")
    deps = [dep for dep in tree["stages"]["stage2"]["deps"] if "${" in dep]
    assert len(deps) == 1
    yaml.dump({"stages": {"stage2": {"cmd": STAGE, "deps": deps, "outs": ["models/stage2"]}}}, tmp_path / "dvc.yaml")
    for name in ("models/stage1", "promoted"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "weights").write_text(name)
    for words in ("git init -q", "git config user.email t@t", "git config user.name t", "dvc init -q"):
        run(*words.split(), cwd=tmp_path)
    (tmp_path / ".gitignore").write_text("/models\n/promoted\n")
    run("git", "add", "-A", cwd=tmp_path)
    run("git", "commit", "-qm", "one", cwd=tmp_path)
    return tmp_path


def locked(project: Path) -> list[str]:
    return [dep["path"] for dep in YAML(typ="safe").load(project / "dvc.lock")["stages"]["stage2"]["deps"]]


def test_stage_2_begins_where_params_yaml_says_and_follows_it(project: Path) -> None:
    run("dvc", "repro", cwd=project)
    assert locked(project) == ["models/stage1"]
    run("git", "add", "-A", cwd=project)
    run("git", "commit", "-qm", "two", cwd=project)
    run("dvc", "exp", "run", "-S", "start.stage2=promoted", cwd=project)
    assert locked(project) == ["promoted"]
    assert (project / "models/stage2/weights").read_text() == "promoted"
    (project / "promoted/weights").write_text("another")
    run("dvc", "repro", cwd=project)
    assert (project / "models/stage2/weights").read_text() == "another", "a promotion reruns stage 2"


def test_another_file_of_prompts_reruns_the_prompts_alone(tmp_path: Path) -> None:
    """dvc.yaml's stage `prompts` as it is, but for what it runs and the code that it depends on; base never sees the file."""
    tree = YAML().load(ROOT / "dvc.yaml")["stages"]
    deps = [dep for dep in tree["prompts"]["deps"] if "${" in dep]
    assert deps == ["${start.prompts}"] and "data/prompts" in tree["causal_init"]["deps"]
    assert [stage for stage in tree if "data/prompts" in tree[stage]["deps"]] == ["causal_init", "stage1", "stage2"]
    stage = f"{sys.executable} -c \"import shutil, sys; shutil.copy(sys.argv[1], 'copy')\" ${{start.prompts}}"
    YAML().dump({"stages": {"prompts": {"cmd": stage, "deps": deps, "outs": ["copy"]}}}, tmp_path / "dvc.yaml")
    text = (ROOT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("prompts: data/manifest.jsonl", "prompts: vidprom.txt"))
    for words in ("git init -q", "dvc init -q"):
        run(*words.split(), cwd=tmp_path)
    for content in ("fog", "snow"):
        (tmp_path / "vidprom.txt").write_text(content)
        run("dvc", "repro", cwd=tmp_path)
        assert (tmp_path / "copy").read_text() == content
