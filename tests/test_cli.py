"""`cf`: what a person types, and what they read when it was wrong."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import tasks.__main__ as cf
from cf_model.metrics.encoders import PINNED
from flows.project import dvc_remote, worktree
from tasks.files import options
from tasks.params.project import Project
from tasks.params.yaml_file import Refused
from tests.preloaded import python_folder

ROOT = Path(__file__).parent.parent
REPEATABLE = ("OMP_NUM_THREADS", "PYTHONHASHSEED", "MALLOC_TRIM_THRESHOLD_")


def command(*words: str, at: Path, python: str | Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """`cf`, by a python that has torch loaded, or another one."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import tasks.__main__ as cf; cf.cli()"
    words = (str(python or python_folder() / "python"), "-c", code, *words)
    return subprocess.run(words, cwd=at, env=os.environ | environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles/tiny.yaml").write_bytes((ROOT / "profiles/tiny.yaml").read_bytes())
    (tmp_path / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    return tmp_path


def test_help_lists_the_stages_in_running_order(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    cf.main(["--help"])
    said = capsys.readouterr().out
    first = [line.split()[0] for line in said.splitlines() if line.startswith("  ")]
    assert first[: len(Project().stages)] == list(Project().stages)
    assert all(len(line) <= 120 for line in said.splitlines())


def test_every_command_shows_an_example_and_takes_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, entry in options.read_commands().items():
        examples = [line for line in entry["epilog"].splitlines() if re.match(rf"  .*\bcf {name}\b", line)]
        assert examples, f"cf {name} --help shows no example"
        if name == "repro":  # whose options are DVC's
            continue
        with pytest.raises(SystemExit) as ended:
            options.parse_options(name, ["--help"])
        assert ended.value.code == 0 and entry["epilog"] in capsys.readouterr().out
        for example in examples:  # without what stands beside it: three spaces away, or in another command
            words = shlex.split(re.split(r" {2,}| && ", example.partition(f"cf {name}")[2].rstrip("\\"))[0])
            if not example.endswith("\\"):
                options.parse_options(name, words)


def test_the_table_of_commands_says_what_the_code_says() -> None:
    commands = options.read_commands()
    stated = {option["name"]: option for entry in commands.values() for option in entry.get("options", [])}
    verbs = {f"{name} {verb}": its for name, entry in commands.items() for verb, its in entry.get("verbs", {}).items()}
    defaults = {name: option["default"] for name, its in verbs.items() for option in its.get("options", []) if "default" in option}
    assert stated["--only"]["choices"] == list(PINNED)
    assert defaults["runs prune"] == worktree.KEEP and defaults["remote push"] == defaults["remote pull"] == dvc_remote.LIMIT
    for target in cf.TARGETS.values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function or "main"))


def test_a_stage_explains_itself(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        cf.main(["validate", "--help"])
    said = capsys.readouterr().out
    assert "Check every value" in said and "--out" in said and "python -m tasks validate --out build/params.json" in said


def test_profiles_are_listed_and_used(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cf.main(["profile", "list"])
    assert capsys.readouterr().out.startswith("tiny")
    cf.main(["profile", "use", "tiny"])
    header, rest = Path("params.yaml").read_text().split("\n", 1)
    assert header.startswith("# From profiles/tiny.yaml") and rest == Path("profiles/tiny.yaml").read_text()
    with pytest.raises(Refused, match="profile big isn't in profiles/; known are tiny"):
        cf.main(["profile", "use", "big"])


def test_validate_writes_the_resolved_parameters(project: Path) -> None:
    cf.main(["profile", "use", "tiny"])
    done = command("validate", at=project)
    assert done.returncode == 0, done.stderr
    assert '"profile": "tiny"' in Path("build/params.json").read_text()
    assert not Path("metrics").exists()


def test_a_refusal_is_one_sentence(project: Path) -> None:
    Path("params.yaml").write_text(Path("profiles/tiny.yaml").read_text().replace("\nseed:", "\nsede:"))
    done = command("validate", at=project)
    assert done.returncode == 2
    assert done.stderr.startswith("cf validate: params.yaml: ") and done.stderr.count("\n") == 1
    assert "Traceback" in command("validate", at=project, CF_TRACEBACK="1").stderr


def test_an_empty_prompt_file_is_refused_before_anything_runs(project: Path) -> None:
    cf.main(["profile", "use", "tiny"])
    Path("prompts.txt").write_text("\n \n")
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(re.sub(r"prompts_file:[^\n]*", "prompts_file: prompts.txt", text))
    done = command("validate", at=project)
    assert done.returncode == 2 and "generate.prompts_file: prompts.txt has no prompt in it; write one prompt a line" in done.stderr
    assert not Path("build/params.json").exists()


def test_unknown_words_are_answered(project: Path) -> None:
    done = command("stage3", at=project)
    assert done.returncode == 2 and done.stderr.startswith("cf stage3: stage3 is neither a stage nor a command; known are validate")


STAGE = '''"""Stage `{name}`: a toy."""
import os
from pathlib import Path

def run(params, track, *, out: Path):
    {body}
    return {{}}
'''


@pytest.mark.parametrize(
    ("body", "code", "traceback"),
    [
        ("raise ValueError('no clip passes the filter;\\n lower it')", 1, False),
        ("raise KeyError('a bug')", 1, True),
        ("int('a bug')", 1, True),
        ("raise OSError(28, 'No space left on device', 'models/base')", 1, False),
        ("os.kill(os.getpid(), 15)", 143, False),
        (f"out.write_text(' '.join(os.environ[name] for name in {REPEATABLE}))", 0, False),
    ],
)
def test_what_was_raised_on_purpose_has_no_traceback(
    body: str, code: int, traceback: bool, project: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A copy of the package with one more stage, in dvc.yaml too."""
    home = tmp_path_factory.mktemp("copy")
    for package in ("tasks", "cf_model"):
        for file in (file for file in (ROOT / package).rglob("*") if file.suffix in (".py", ".toml")):
            (home / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            (home / file.relative_to(ROOT)).write_bytes(file.read_bytes())
    (home / "tasks/toy.py").write_text(STAGE.format(name="toy", body=body))
    stages = Path("dvc.yaml").read_text()
    Path("dvc.yaml").write_text(stages.replace("\nstages:\n", "\nstages:\n  toy: {desc: a toy, cmd: python -m tasks toy --out toy.txt}\n"))
    cf.main(["profile", "use", "tiny"])
    environment = {"PYTHONPATH": str(home), "OMP_NUM_THREADS": "7"}
    python = sys.executable if code == 0 else python_folder() / "python"  # which has the variables that a stage starts itself again for
    words = [python, "-m", "tasks", "toy", "--out", "toy.txt"]
    done = subprocess.run(words, cwd=project, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert ("Traceback" in done.stderr) == traceback, done.stderr
    if code == 0:
        assert Path("toy.txt").read_text() == "1 0 4000000000"
    elif not traceback and code == 1:
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("cf toy: ")


COUNTING = """
import collections, os, sys
from pathlib import Path
read = Path.read_text
def read_text(self, *words, **more):
    with open(os.environ["COUNTS"], "a") as counts:
        counts.write(f"{os.getpid()} {self.name}\\n")
    return read(self, *words, **more)
Path.read_text = read_text
"""


def test_params_and_dvc_yaml_are_read_once(project: Path) -> None:
    """In all processes that a stage takes before it begins: the one that a person starts is started again."""
    cf.main(["profile", "use", "tiny"])
    (project / "sitecustomize.py").write_text(COUNTING)
    counting = {"PYTHONPATH": str(project), "PYTHONHASHSEED": "1", "COUNTS": str(project / "counts")}
    done = command("validate", at=project, python=sys.executable, **counting)
    assert done.returncode == 0, done.stderr
    names = [line.split()[1] for line in Path("counts").read_text().splitlines()]
    assert names.count("params.yaml") == 1 and names.count("dvc.yaml") == 1


def test_a_video_has_a_command_of_its_own(project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its old name, which the stage has too, is understood and answered."""
    monkeypatch.setitem(cf.TARGETS, "video", "builtins:print")
    for command in ("video", "generate"):
        cf.main([command, "--model", "m"])
        shown = capsys.readouterr()
        assert shown.out == "['--model', 'm']\n" and ("now called `cf video`" in shown.err) == (command == "generate")
