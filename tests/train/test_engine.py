"""Ranks: two processes over gloo against one, on the same seeds; what they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cf_model.model.flow import Shared, gaussian, uniform
from cf_model.train import engine

ROOT = Path(__file__).parent.parent.parent


def run(jobs: str, out: Path, count: int, steps: int = 20) -> None:
    """`count` processes, which train one job after the other; 1 is one that knows of no ranks."""
    for job in jobs.split(","):
        (out / job).mkdir(parents=True, exist_ok=True)
    (out / "meeting").mkdir(exist_ok=True)
    for rest in (out / "meeting").iterdir():
        rest.unlink()
    command = [sys.executable, "-m", "tests.train.ranked", jobs, str(out), str(steps)]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CF_MEETING": str(out / "meeting"), "CF_RANKS": str(count)}
    ranked = [common | {"CF_RANK": str(n)} for n in range(count)] if count > 1 else [common]
    processes = [subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) for env in ranked]
    for process in processes:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said


JOBS = ("base", "teacher", "causal_init", "student")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    for count in (1, 2):
        run(",".join(JOBS), folder / str(count), count)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_two_ranks_are_one_process(job: str, trained: Path) -> None:
    """After 20 steps: weights of every trained model, and every value in metrics.jsonl. `student` promotes by similarity."""
    one, two = (load_file(trained / f"{count}/{job}/weights.safetensors") for count in (1, 2))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    rows = [[json.loads(line) for line in (trained / f"{count}/{job}/metrics.jsonl").read_text().splitlines()] for count in (1, 2)]
    for alone, shared in zip(*rows, strict=True):
        assert shared == pytest.approx(alone, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_ranks_have_one_bank_of_mistakes(trained: Path) -> None:
    """To the bit the same in both, although each found half of the mistakes; and one process's, which has filled up and replaced."""
    first, second = ((trained / f"2/teacher/bank-{n}.safetensors").read_bytes() for n in (0, 1))
    assert first == second
    one, two = (load_file(trained / f"{count}/teacher/bank-0.safetensors") for count in (1, 2))
    assert one["count"].tolist() == two["count"].tolist() == [3, 3, 3] and float(one["latent"].abs().mean()) > 0.1
    for kind in ("latent", "noise"):
        torch.testing.assert_close(two[kind], one[kind], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["teacher", "student"])
def test_two_ranks_resumed_are_two_ranks_never_stopped(job: str, trained: Path, tmp_path: Path) -> None:
    run(job, tmp_path, 2, 8)  # its last checkpoint is that of step 5
    run(job, tmp_path, 2, 20)
    for file in ("weights.safetensors", "metrics.jsonl"):
        assert (tmp_path / job / file).read_bytes() == (trained / f"2/{job}" / file).read_bytes()


def test_every_rank_draws_the_batch_and_keeps_its_rows() -> None:
    alone = torch.Generator().manual_seed(4)
    parts = [Shared("cpu", part, 3) for part in range(3)]
    for one in parts:
        one.manual_seed(4)
    for draw in (gaussian, uniform):
        whole = draw((6, 5), alone)
        assert torch.equal(torch.cat([draw((2, 5), one) for one in parts]), whole)
    ends = {int(torch.randint(1000, (), generator=one)) for one in [*parts, alone]}
    assert len(ends) == 1, "what is not drawn for a batch is the same everywhere"


def test_a_batch_that_ranks_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "ranks", lambda: 4)
    with pytest.raises(ValueError, match=r"batch is 6, which 4 ranks can't share evenly; use CF_RANKS of \[1, 2, 3, 6\], or a batch of 8"):
        engine.mine(range(6))
