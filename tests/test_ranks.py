"""Real processes, stopped in every way a machine has, alone and as two ranks: what they say, what they leave, how they go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cf_model.model import checkpoint
from tasks.params.yaml_file import Refused
from tasks.runner import ranks
from tests.preloaded import python_folder

ROOT = Path(__file__).parent.parent
STEPS = 60
STAGE = f"""
import os, resource, sys, time
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, {str(ROOT)!r})
from tasks import __main__ as cf
from tasks.params.project import Project
from tasks.runner import ranks
from tasks.runner.execute import execute
if ranks.get_rank() is None and int(os.environ.get("CF_RANKS", "1")) > 1:
    sys.exit(ranks.launch_ranks("toy", int(os.environ["CF_RANKS"])))
import torch
from safetensors.torch import save_file
from cf_model.train.trainer.ema import EMA
from cf_model.train.trainer.engine import Optimizer, OptimizerSpec
from cf_model.train.trainer.loop import fit
from cf_model.train.trainer.observe import StepTimer
from cf_model.train.trainer.ranks import BatchRandom, get_rank
from cf_model.model.flow import draw_gaussian

class Job:
    steps, save_every, newest_batch = {STEPS}, 5, {{}}

    def __init__(self):
        torch.manual_seed(0)
        self.model, self.random, self.timer = torch.nn.Linear(64, 64), BatchRandom(1, batch=4), StepTimer()
        self.optimizer = Optimizer(self.model, OptimizerSpec(1e-3, 0.0, 0.9, 0.99, 0.0, 0.0, 1.0, 2, 0.0), {STEPS})
        self.ema = EMA(self.model, 0.9)
        self.state = dict(model=self.model, optimizer=self.optimizer, average=self.ema)

    def step(self, number):
        if os.environ.get("FULL") == str(number):  # files may not grow beyond a few KB any more
            resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
        if os.environ.get("RAISE") == str(number) and get_rank() == 1:
            raise KeyError("a bug in rank 1")
        if os.environ.get("SLOW"):
            os.write(1, f"step {{number}} {{get_rank()}} {{os.getpid()}}\\n".encode())  # in one piece: two ranks share the pipe
            time.sleep(0.05)
        x = draw_gaussian((len(self.random.take_own(range(4))), 64), self.random.draw_step(number))
        loss = self.model(x).square().mean()
        loss.backward()
        values = dict(loss=loss.item(), gradient=self.optimizer.step())
        self.ema.update()
        return values

def run(params, track, *, out):
    job = Job()
    fit(job, track)
    out.mkdir()
    save_file(job.ema.model.state_dict(), out / "model.safetensors")
    track.save(out)
    return {{}}

def main(argv):
    project, paths = Project(), dict(out=Path("made"))
    project.tree = {{"seed": 0}}
    project.params = SimpleNamespace(seed=0, threads=1, watch=(), tracking=SimpleNamespace(wandb="off", project="toy"))
    store = None if ranks.get_rank() is None else ranks.join_ranks()
    if ranks.get_rank():
        ranks.run_follower("toy", run, paths, project.params, store)
    else:
        execute("toy", run, paths, project, began=time.time(), announce=store and (lambda work: store.set("work", str(work))))

cf.main, sys.argv = main, ["cf", "toy"]
cf.cli()
"""


def start(folder: Path, *, real: bool = False, **environment: str) -> subprocess.Popen[str]:
    """By a python that has torch loaded, and so are its ranks; `real` is a process of its own, and each rank one."""
    folder.mkdir(exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    python = sys.executable if real else str(python_folder() / "python")
    code = f"import sys\nsys.executable = {python!r}\n{STAGE}"
    return subprocess.Popen([python, "-c", code], cwd=folder, env=env, stdout=-1, stderr=-1, text=True)


def until(process: subprocess.Popen[str], step: int, rank: int = 0) -> int:
    """Reads on until this rank is in this step; its process id."""
    assert process.stdout
    for line in process.stdout:
        words = line.split()
        if words[:1] == ["step"] and int(words[1]) >= step and int(words[2]) == rank:
            return int(words[3])
    raise AssertionError(process.communicate()[1])


def finished(process: subprocess.Popen[str], code: int) -> str:
    _, said = process.communicate(timeout=300)
    assert process.returncode == code, said
    return said


def made(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "made").iterdir()}


def began_after(said: str) -> int:
    return int(said.split("toy: continues after step ")[1].split()[0])


def terminated(folder: Path, step: int, **environment: str) -> int:
    """SIGTERM in or after this step; the step that was saved, which the next run must begin after."""
    process = start(folder, real=True, SLOW="1", **environment)
    until(process, step)
    process.terminate()
    said = finished(process, 143)
    assert said.count("toy: asked to stop; saved after step ") == 1 and "Traceback" not in said
    return int(said.split("saved after step ")[1].split(",")[0])


@pytest.mark.slow
def test_one_process_stopped_in_every_way_ends_as_never_stopped(tmp_path: Path) -> None:
    """A full disk keeps the last checkpoint; SIGKILL loses the steps since the last save; SIGTERM loses none."""
    folder = tmp_path / "stopped"
    whole = start(tmp_path / "whole")
    said = finished(start(folder, FULL="7"), 1)
    (work,) = (folder / "work/toy").iterdir()
    assert f"cf toy: work/toy/{work.name} has no room for step-00000010 (File too large" in said
    assert "the last checkpoint, step-00000005, is intact: make room and start again" in said and "Traceback" not in said
    assert not list(work.glob("*.partial")) and checkpoint.verify_checkpoint(work / "step-00000005")["step"] == 5

    killed = start(folder, SLOW="1")
    until(killed, 17)
    killed.kill()
    killed.communicate()
    saved = sorted(path.name for path in work.glob("step-*"))[-1]
    assert "step-00000015" <= saved <= "step-00000030"

    stopped = terminated(folder, 32)
    assert 32 < stopped < 60
    assert began_after(finished(start(folder), 0)) == stopped
    finished(whole, 0)
    assert made(folder) == made(tmp_path / "whole"), "the weights, and metrics.jsonl"


@pytest.mark.slow
def test_two_ranks_stopped_in_every_way_end_as_never_stopped(tmp_path: Path) -> None:
    """A rank that fails or is killed takes the other down, and what it died of is said once."""
    folder = tmp_path / "stopped"
    whole = start(tmp_path / "whole", CF_RANKS="2")
    said = finished(start(folder, CF_RANKS="2", RAISE="7"), 1)
    assert said.count("Traceback") == 1 and said.count("KeyError: 'a bug in rank 1'") == 1
    assert "cf toy: rank 1 of 2 stopped: Traceback" in said

    killed = start(folder, CF_RANKS="2", SLOW="1")
    os.kill(until(killed, 12, rank=1), signal.SIGKILL)
    began = time.monotonic()
    said = finished(killed, 137)
    assert time.monotonic() - began < 60
    assert "cf toy: rank 1 of 2 was ended by SIGKILL" in said and "Traceback" not in said and began_after(said) == 5

    stopped = terminated(folder, 22, CF_RANKS="2")
    assert 22 < stopped < 60
    orphaned = start(folder, CF_RANKS="2", SLOW="1")
    until(orphaned, stopped + 5)
    orphaned.kill()
    assert began_after(orphaned.communicate(timeout=120)[1]) == stopped, "the pipe is closed: no rank outlives its launcher"
    finished(start(folder, CF_RANKS="2"), 0)
    finished(whole, 0)
    assert made(folder) == made(tmp_path / "whole")


def test_the_environment_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("CF_RANKS", raising=False)
    scratch = {"base": {"init": "scratch"}}
    assert [ranks.count_ranks(stage, scratch) for stage in ("base", "stage2", "teacher")] == [1, 1, 1]
    monkeypatch.setenv("CF_RANKS", "4")
    assert [ranks.count_ranks(stage, scratch) for stage in ("base", "stage2", "teacher")] == [4, 4, 4]
    assert ranks.count_ranks("base", {"base": {"init": "wan"}}) == 1, "an import is no training"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(Refused, match="CF_RANKS is 4, but there are 2 GPUs"):
        ranks.count_ranks("stage2", scratch)
    monkeypatch.delenv("CF_RANKS")
    assert ranks.count_ranks("stage2", scratch) == 2
    monkeypatch.setenv("CF_RANKS", "two")
    with pytest.raises(Refused, match="CF_RANKS is 'two'; it must be a whole number from 1 on"):
        ranks.count_ranks("stage2", scratch)
