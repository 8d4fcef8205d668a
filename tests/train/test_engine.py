"""Ranks, groups and DeepSpeed: two real processes over gloo against one of plain torch, on the same seeds; what they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cf_model.data.video_reader import read_video
from cf_model.model.flow import draw_gaussian, draw_uniform
from cf_model.train.trainer import engine
from cf_model.train.trainer import ranks as trainer_ranks
from cf_model.train.trainer import zero as trainer_zero
from cf_model.train.trainer.engine import PLAIN, EngineSpec, OptimizerSpec
from tests.preloaded import python_folder
from tests.train import ranked

ROOT = Path(__file__).parent.parent.parent


JOBS = ("base", "teacher", "causal_init", "student")
OUTLIVING = ("streaming", "sharing")
STOP = 6  # steps of a run that is stopped; its last checkpoint is that of step 4, between two updates of the student and within a video
SPLIT = [{"zero": zero, "micro_batch": micro} for zero in (0, 2, 3) for micro in (None, 1)]


def run(plan: list[dict[str, Any]], folder: Path, count: int) -> None:
    """`count` processes by torchrun, which train one job after the other; 1 is one that knows of no ranks. There is no compiler."""
    common = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    common |= {"CC": "false", "CXX": "false", "TORCH_EXTENSIONS_DIR": str(folder / "compiled"), "PYTHONWARNINGS": "ignore::FutureWarning"}
    python = str(python_folder() / "python")
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", "--local-addr=localhost", f"--nproc-per-node={count}", "--no-python"]
    command = [*(torchrun if count > 1 else []), python, "-m", "tests.train.ranked", json.dumps(plan), str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=common, stderr=subprocess.PIPE, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-5000:]


def name(split: dict[str, Any]) -> str:
    return f"ZeRO {split['zero']}{', accumulated' if split['micro_batch'] else ''}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the tests below compare: first by one process, then by two, then what one makes of theirs.

    Videos are made where they are compared, and where ZeRO 3 splits what they are made with.
    """
    folder, grouped = tmp_path_factory.mktemp("trained"), {"micro_batch": 1}
    alone: list[dict[str, Any]] = [{"out": f"1/{job}", "every": 4 * (job in JOBS)} for job in (*JOBS, *OUTLIVING, "broken")]
    alone += [{"out": f"grouped/{job}", "engine": grouped} for job in JOBS]
    alone += [{"out": "begun/base", "steps": STOP}]
    run(alone, folder, 1)
    two: list[dict[str, Any]] = [{"out": f"2/{job}", "every": 4} for job in JOBS]
    two += [{"out": f"resumed/{job}", "every": 4, "steps": steps} for job in JOBS for steps in (STOP, ranked.STEPS)]
    for job in OUTLIVING:
        two += [{"out": f"2/{job}", "engine": grouped}, {"out": f"stopped/{job}", "steps": STOP, "engine": grouped}]
        two += [{"out": f"resumed/{job}", "begin": f"stopped/{job}", "engine": grouped}]
    for split in SPLIT:
        more = {3: JOBS, 4: ("causal_init",)}.get(SPLIT.index(split), ())
        jobs = {"student", *more, "broken" if split["micro_batch"] else "base"}
        samples = {"student": 4} if split["zero"] == 3 else {}
        own = {"engine": {"use": "deepspeed", **split}}
        two += [{"out": f"{name(split)}/{job}", "every": samples.get(job, 0), **own} for job in sorted(jobs)]
    for zero in (2, 3):
        split = {"use": "deepspeed", "zero": zero}
        two += [{"out": f"stopped {zero}/base", "steps": STOP, "engine": split}]
        two += [{"out": f"resumed {zero}/base", "begin": f"stopped {zero}/base", "engine": split}]
        two += [{"out": f"taken {zero}/base", "begin": "begun/base", "engine": split}]
        two += [{"out": f"offloaded {zero}/base", "engine": {**split, "offload": "optimizer", "micro_batch": 1}}]
    run(two, folder, 2)
    after = [{"out": f"handed/{job}", "begin": f"stopped/{job}"} for job in OUTLIVING]
    run([*after, *({"out": f"handed {zero}/base", "begin": f"stopped {zero}/base"} for zero in (2, 3))], folder, 1)
    return folder


def same(one: Path, two: Path, *, values: bool = True) -> None:
    """Weights within 1e-5 and, line by line, every value in metrics.jsonl, but for that of videos, which not all of them make."""
    held, other = (load_file(folder / "weights.safetensors") for folder in (one, two))
    assert held.keys() == other.keys()
    for name, value in held.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    rows = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (one, two)]
    for row in (row for part in rows for row in part):
        row.pop("clipped", None)
    for alone, shared in zip(*rows, strict=True) if values else ():
        assert shared == pytest.approx(alone, rel=1e-4, abs=1e-5, nan_ok=True)
        losses = [{name: value for name, value in row.items() if "loss" in name} for row in (alone, shared)]
        assert losses[1] == pytest.approx(losses[0], rel=0, abs=1.001e-5, nan_ok=True)  # six digits are written: the last may differ by one


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_two_ranks_are_one_process(job: str, trained: Path) -> None:
    """After all steps: the rate's rise, its height and its fall. `student` promotes by similarity."""
    same(trained / "1" / job, trained / "2" / job)


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_groups_of_a_batch_are_the_batch(job: str, trained: Path) -> None:
    """Four samples at once, or one after the other: also where what is remembered is decided by what was made."""
    same(trained / "1" / job, trained / "grouped" / job)


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLIT, ids=name)
def test_deepspeed_in_two_ranks_is_plain_torch_in_one(split: dict[str, Any], trained: Path) -> None:
    """Student and critic, after all steps; with ZeRO 2 every other stage; a step that was not finite."""
    made = sorted((trained / name(split)).iterdir())
    assert len(made) == {3: 5, 4: 3}.get(SPLIT.index(split), 2)
    for folder in made:
        same(trained / "1" / folder.name, folder, values=folder.name != "broken")
    rows = [json.loads(line) for line in (trained / "1/broken/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["loss"] is None] == [3]


@pytest.mark.slow
@pytest.mark.parametrize("groups", ["", ", accumulated"])
def test_gradients_are_reduced_once_an_update(groups: str, trained: Path) -> None:
    """With ZeRO 2, of 8 updates of the critic and 4 of the student, of two chunks and one or two groups each.

    A checkpoint gathers two moments of both networks by the same function; the rest are norms and logged values.
    """
    weights = sum(p.numel() for p in ranked.denoiser().parameters())
    calls, numbers = json.loads((trained / f"ZeRO 2{groups}/student/sent.json").read_text())["all_reduce"]
    assert 0 <= numbers - (8 + 4 + 1 * 4) * weights < 0.1 * weights and calls < numbers / 100


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_an_offloaded_optimizer_takes_the_same_steps(zero: int, trained: Path) -> None:
    same(trained / "1/base", trained / f"offloaded {zero}/base")


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_deepspeed_goes_on_to_the_bit_and_its_checkpoints_are_anyones(zero: int, trained: Path) -> None:
    through = trained / f"ZeRO {zero}/base"
    for file in ("weights.safetensors", "metrics.jsonl"):
        assert (trained / f"resumed {zero}/base" / file).read_bytes() == (through / file).read_bytes()
    same(trained / "1/base", trained / f"handed {zero}/base")  # to one process of plain torch
    same(trained / "1/base", trained / f"taken {zero}/base")  # from one


@pytest.mark.slow
@pytest.mark.parametrize("job", OUTLIVING)
def test_rollouts_that_outlive_a_step_go_on_in_ranks_and_groups(job: str, trained: Path) -> None:
    """Stopped between two updates of the student, and within a video; resumed in the same and in other shares of the batch."""
    same(trained / "1" / job, trained / "2" / job)
    for file in ("weights.safetensors", "metrics.jsonl"):
        assert (trained / "resumed" / job / file).read_bytes() == (trained / "2" / job / file).read_bytes()
    same(trained / "1" / job, trained / "handed" / job)


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_every_rank_makes_the_samples_and_the_first_writes_them(job: str, trained: Path) -> None:
    """Two sets of a causal model too; a follower has no codec and would fail if it wrote."""
    alone, shared = (trained / f"{count}/{job}/samples" for count in (1, 2))
    assert sorted(file.name for file in shared.iterdir()) == [f"step-{step:06d}-{n}.mp4" for step in (4, 8) for n in (0, 1)]
    for file in shared.iterdir():
        one, two = (read_video(folder / file.name, height=32, width=32, fps=16).astype(int) for folder in (alone, shared))
        assert abs(one - two).mean() < 0.5 < one.std()


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
@pytest.mark.parametrize("job", JOBS)
def test_two_ranks_resumed_are_two_ranks_never_stopped(job: str, trained: Path) -> None:
    for file in ("weights.safetensors", "metrics.jsonl"):
        assert (trained / f"resumed/{job}" / file).read_bytes() == (trained / f"2/{job}" / file).read_bytes()


def test_a_batch_of_64_in_sixteen_groups_is_64_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranked, "BATCH", 64)
    whole = ranked.base()[0]
    monkeypatch.setattr(ranked, "ENGINE", replace(PLAIN, micro_batch=4))
    parts = ranked.base()[0]
    assert parts.random.count == 16
    for number in range(3):
        one, other = whole.step(number), parts.step(number)
        assert other["loss"] == pytest.approx(float(one["loss"]), abs=1e-5)
        assert other["gradient"] == pytest.approx(float(one["gradient"]), rel=1e-5)
    for mine, its in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-5)


def test_a_row_has_its_numbers_in_any_share_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks with two groups each, and one process; what is drawn for the batch as a whole is the same everywhere."""

    def draw(rank: int, count: int, groups: int) -> list[tuple[torch.Tensor, torch.Tensor, list[int], list[int]]]:
        monkeypatch.setattr(trainer_ranks, "get_rank", lambda: rank)
        monkeypatch.setattr(trainer_ranks, "count_ranks", lambda: count)
        numbers = trainer_ranks.BatchRandom(4, batch=12, groups=groups)
        parts = []
        for _ in numbers.groups(7):
            shared, rng = numbers.integers(0, 999, 12), numbers.rng
            shape = (12 // count // groups, 5)
            parts.append((draw_gaussian(shape, rng), draw_uniform(shape, rng), shared, numbers.take_own(range(12))))
        return parts

    (whole,) = draw(0, 1, 1)
    parts = [part for rank in range(3) for part in draw(rank, 3, 2)]
    rows = [row for part in parts for row in part[3]]
    assert sorted(rows) == list(range(12)) and all(part[2] == whole[2] for part in parts)
    for kind in (0, 1):
        assert torch.equal(torch.cat([part[kind] for part in parts]), whole[kind][rows])  # type: ignore[call-overload]


def test_a_batch_that_ranks_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "count_ranks", lambda: 4)
    with pytest.raises(ValueError, match=r"batch is 6, which 4 ranks can't share evenly; use CF_RANKS of \[1, 2, 3, 6\], or a batch of 8"):
        PLAIN.count_groups(6)
    with pytest.raises(ValueError, match=r"micro_batch is 2, .* of 12 each of 4 ranks takes 3 .* use a micro_batch of \[1, 3\], or null"):
        replace(PLAIN, micro_batch=2).count_groups(12)
    assert [replace(PLAIN, micro_batch=micro).count_groups(24) for micro in (None, 1, 2, 3, 6)] == [1, 6, 3, 2, 1]


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"zero": 2}, "only DeepSpeed splits and offloads"),
        ({"use": "auto", "offload": "optimizer"}, "DeepSpeed offloads what it splits"),
        ({"micro_batch": 0}, "use 1 or more, or null"),
    ],
)
def test_an_engine_that_makes_no_sense_is_refused(stated: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(PLAIN, **stated)


def test_muon_is_refused_where_matrices_are_split() -> None:
    spec = OptimizerSpec(1e-3, 0.02, 0.9, 0.99, 0.0, 0.0, 1.0, 2, 0.0)
    with pytest.raises(ValueError, match=r"muon_lr is 0.02, and engine.zero 2: Muon needs whole matrices.* use engine.zero: 0, or muon_lr"):
        trainer_zero.build_optimizer(torch.nn.Linear(2, 2), spec, 5, EngineSpec("deepspeed", 2, "none", None))


def test_without_deepspeed_the_way_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    spec = OptimizerSpec(1e-3, 0.0, 0.9, 0.99, 0.0, 0.0, 1.0, 2, 0.0)
    with pytest.raises(ValueError, match=r"can't be imported .*; `make deepspeed` installs it; or use engine.use: torch"):
        trainer_zero.build_optimizer(torch.nn.Linear(2, 2), spec, 5, EngineSpec("deepspeed", 0, "none", None))


def test_a_deepspeed_that_lacks_a_name_is_refused_before_any_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each name that is checked at import; and one that only an optimiser has which was made."""
    deepspeed = pytest.importorskip("deepspeed")
    for place, names in trainer_zero.IMPORTED_NAMES.items():
        for name in names:
            with monkeypatch.context() as without:
                without.delattr(attrgetter(place)(deepspeed), name)
                if place == "ops":  # whose own __getattr__ makes the name when it is asked for
                    without.delattr(deepspeed.ops, "__getattr__")
                said = rf"deepspeed [\d.]+ has no {place}\.{name}, which .* needs; `make deepspeed` installs .*, or use engine.use: torch"
                with pytest.raises(ValueError, match=said):
                    trainer_zero._import_deepspeed(torch.device("cpu"))
    with pytest.raises(ValueError, match="has no single_partition_of_fp32_groups, which"):
        trainer_zero.check_name(deepspeed, trainer_zero.OPTIMIZER_NAMES[2], object())


def test_plain_training_never_imports_deepspeed() -> None:
    said = "import sys, tests.train.ranked as r; r.base()[0].step(0); assert 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", said], cwd=ROOT, check=True)
