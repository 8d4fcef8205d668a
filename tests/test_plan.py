"""`cf plan`, and the stages that refuse to start because of it."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import tasks.__main__ as cf
from cf_model.plan import fit, forecast, hardware, need
from cf_model.plan.need import StageNeed
from tasks.commands import plan, preset
from tasks.files.videos import VIDEO_SUFFIXES
from tasks.params import load, schema, yaml_file
from tasks.params.yaml_file import Refused
from tasks.runner.ranks import TRAINING_STAGES

ROOT = Path(__file__).parent.parent
GIB = 2**30
TINY, WAN = (ROOT / f"profiles/{name}.yaml" for name in ("tiny", "wan-1.3b"))


@pytest.fixture(autouse=True, scope="module")
def _each_need_is_estimated_once() -> Iterator[None]:
    """They are functions of frozen settings alone, and most tests ask for all five stages of the same two profiles."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("estimate_base", "estimate_teacher", "estimate_causal_init", "estimate_student"):
            patch.setattr(need, name, functools.cache(getattr(need, name)))
        yield


@pytest.fixture(scope="module")
def tiny() -> schema.Params:
    return load.load_params(TINY)


@pytest.fixture(scope="module")
def wan() -> schema.Params:
    return load.load_params(WAN)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    cf.main(["plan", *words])
    return capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- the command


def test_the_table_has_a_row_for_each_stage_that_trains(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "--params", str(TINY), "--gpus", "0").splitlines()
    for stage in TRAINING_STAGES:
        assert sum(line.startswith(f"{stage} ") for line in lines) == 2, "time and disk; memory"
    assert "1,231,024 parameters" in lines[0] and "CPU" in lines[2]
    assert all(len(line) <= 140 for line in lines)


def test_videos_of_every_ending_are_counted(tiny: schema.Params, tmp_path: Path) -> None:
    """As the stage `clips` takes them: below subfolders too, in upper case too, and no folder that is named like a video."""
    (tmp_path / "sub").mkdir()
    for number, suffix in enumerate(VIDEO_SUFFIXES):
        (tmp_path / "sub" / f"{number}{suffix.upper() if number % 2 else suffix}").touch()
    (tmp_path / "text.txt").touch()
    (tmp_path / "folder.mp4").mkdir()
    stated = tiny.model_copy(update={"clips": tiny.clips.model_copy(update={"source": "folder", "folder": tmp_path})})
    assert plan.count_clips(stated) == len(VIDEO_SUFFIXES) == 15


def test_wan_on_eight_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--params", str(WAN), "--gpus", "8", "--gpu-memory", "80")
    out = said(capsys, *words)
    assert "8 GPUs of 80.0 GiB, 35% of 989 TFLOP/s each" in out and "274 MiB of keys and values" in out
    assert not any(line.startswith("base ") for line in out.splitlines()), "it is imported, not trained"
    found = {row["stage"]: row for row in json.loads(said(capsys, *words, "--json"))["stages"]}
    assert list(found) == ["teacher", "causal_init", "stage1", "stage2"]
    stage2 = found["stage2"]
    assert stage2["gib"]["0"]["at_once"] == 0, "unsharded it is too much for 80 GiB"
    assert stage2["gib"]["2"]["at_once"] == 1 and stage2["gib"]["2"]["peak"] < 80, "a micro-batch of 1, as the profile states it"
    assert stage2["hours"] * 8 == pytest.approx(500 * stage2["tflop_per_step"] / (989 * 0.35) / 3600)
    # docs/method.md, "Cost", has about 200, 75 and 270 to 370 GPU hours, the last with rollouts of 105 latents for each update
    assert 130 < found["teacher"]["hours"] * 8 < 200 and 50 < found["stage1"]["hours"] * 8 < 75 and 130 < stage2["hours"] * 8 < 270


def test_memory_falls_with_the_zero_stage_and_the_ranks(wan: schema.Params) -> None:
    for one in forecast.estimate_needs(wan).values():
        peaks = [one.peak(1, zero, 8) for zero in (0, 1, 2, 3)]
        assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 3, "stages 1 and 2 need as much"
        assert one.peak(1, 3, 16) < one.peak(1, 3, 8) and one.peak(1, 0, 16) == one.peak(1, 0, 8)


def test_every_preset_can_be_planned() -> None:
    stated = yaml_file.read_yaml(WAN)
    params = {name: load.validate_params(preset.apply_preset(stated, name), WAN) for name in preset.list_files("preset")}
    made = {name: need.estimate_student(p.stage2, forecast.estimate_costs(p), p.teacher.view) for name, p in params.items()}
    assert all(one.operations > 0 and one.memory > 0 for one in made.values())
    assert made["longlive"].operations < made["longlive_init"].operations / 2, "a stream makes only what is new"
    assert made["cf_memoryless_teacher"].operations < made["cf_default"].operations, "scores without a context are cheaper"
    # rollouts of 84 to 105 latents, as docs/method.md, "Cost", reckons with, but one for both updates
    assert 200 < made["cf_released"].total / (989e12 * 0.35) / 3600 < 320


def test_hours_of_tiny_are_those_it_took(tiny: schema.Params) -> None:
    """On the machine whose speed the plan states, data and start included; one speed stands for five stages that reach 20 to 35
    GFLOP/s there. The slowest is causal_init, whose real pasts are read by many passes of three frames without gradient: they take more
    time than their operations say, by more than the quarter that holds for the others.
    """
    run = json.loads((ROOT / "benchmarks/results/plan-hours.json").read_text())
    measured, stated = run["cpu_seconds"], yaml_file.read_yaml(TINY)
    for key, value in run["settings"].items():
        section, name = key.split(".")
        stated[section][name] = value
    machine = hardware.Hardware(1, GIB, hardware.CPU_TFLOPS, "CPU", "")
    for stage, one in forecast.estimate_needs(load.validate_params(stated, TINY)).items():
        tolerance = 0.4 if stage == "causal_init" else 0.25
        assert 3600 * hardware.estimate_hours(one, machine) == pytest.approx(measured[stage], rel=tolerance), stage


def test_a_shared_rollout_is_made_once_for_all_updates_of_the_critic(tiny: schema.Params) -> None:
    """Of n rollouts n - 1 are saved: nothing with one update, a half of them with two, two thirds with three."""

    def saved(updates: int) -> float:
        kinds = [replace(tiny.stage2, rollouts=kind, critic_updates=updates) for kind in ("each", "shared")]
        each, shared = (forecast.estimate_needs(tiny.model_copy(update={"stage2": spec}))["stage2"].operations for spec in kinds)
        return each - shared

    assert saved(1) == 0 < saved(2)
    assert saved(3) / saved(2) == pytest.approx((2 / 3) / (1 / 2))


def test_the_critics_warm_up_has_no_update_of_the_student(tiny: schema.Params) -> None:
    """150 updates without a warm-up, 120 after 90 steps of it, 75 after 225: the planned cost falls by as many."""
    specs = [replace(tiny.stage2, critic_warmup=warmup) for warmup in (0, 90, 225)]
    none, short, long = (forecast.estimate_needs(tiny.model_copy(update={"stage2": spec}))["stage2"].operations for spec in specs)
    assert none - short > 0.01 * none
    assert (none - long) / (none - short) == pytest.approx(75 / 30)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "-1"], "--gpus is -1; use 0 for the CPU"),
        (["--utilisation", "35"], "--utilisation is 35.0; it is a share"),
        (["--gpus", "8", "--gpu-memory", "0"], "--gpu-memory is 0.0; use"),
        (["--tflops", "-5"], "--tflops is -5.0; use"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(Refused, match=message.replace("(", r"\(")):
        plan.main(["--params", str(TINY), *words])


@pytest.mark.parametrize("value, text", [(0, "0"), (1234.5, "1,234"), (12.34, "12.3"), (0.01234, "0.0123"), (0.000001, "1e-06")])
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert fit.format_number(value) == text


def test_a_checkpoint_is_as_large_as_planned(tiny: schema.Params, tmp_path: Path) -> None:
    """Of a model of tiny's kind: the file that two steps of `base` leave."""
    from cf_model.model import checkpoint, wan
    from cf_model.train.trainer.ema import EMA
    from cf_model.train.trainer.engine import Optimizer

    one = forecast.estimate_needs(tiny)["base"]
    made = wan.build_transformer(tiny.model, channels=12, text_channels=64, seed=0)
    optimizer = Optimizer(made, tiny.base.optimizer, 10)
    for parameter in made.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    parts = {"model": made, "average": EMA(made, 0.9), "optimizer": optimizer}
    folder = checkpoint.save_checkpoint(tmp_path, 1, {name: part.state_dict() for name, part in parts.items()})
    assert sum(file.stat().st_size for file in folder.iterdir()) == pytest.approx(one.checkpoint, rel=0.01)
    wan.save_transformer(made, tmp_path / "out")
    written = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert written == pytest.approx(forecast.estimate_disk(tiny, "base", one)["out"], rel=0.01)


# ------------------------------------------------------------------------------------------------------- the refusal


def refused(p: schema.Params, stage: str, free: float, split: int | None = None) -> str:
    with pytest.raises(ValueError) as error:
        one = forecast.estimate_needs(p)[stage]
        leaner, work = forecast.estimate_checkpointed(p, stage), fit.WorkSplit(split or one.batch, 0, 1)
        fit.refuse_memory(stage, one, leaner, free * GIB, "machine", work)
    return str(error.value)


def test_a_stage_that_fits_is_never_refused(tiny: schema.Params, wan: schema.Params, tmp_path: Path) -> None:
    for p, free in ((tiny, 0.25), (wan, 4000)):
        for stage, one in forecast.estimate_needs(p).items():
            fit.refuse_memory(stage, one, None, free * GIB, "machine", fit.WorkSplit(one.batch, 0, 1))
            assert one.peak(one.batch) * 0.7 < free * GIB
    plan.refuse_unfit_stage(tiny, "stage2", tmp_path / "models/stage2", tmp_path / "work/stage2")


def test_a_stage_estimates_no_other_stage_before_it_begins(tiny: schema.Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("base", "teacher", "causal_init"):
        monkeypatch.setattr(forecast.need, f"estimate_{other}", lambda *given: pytest.fail("this estimate is of another stage"))
    plan.refuse_unfit_stage(tiny, "stage2", tmp_path / "models/stage2", tmp_path / "work/stage2")


def test_a_refusal_names_what_is_short_and_what_would_help(tiny: schema.Params, wan: schema.Params) -> None:
    message = refused(wan, "stage2", 139)
    assert message.startswith("stage2 needs about 2,01")
    assert message.endswith("but this machine has 139; use engine.micro_batch: 2")
    assert "8 such ranks with engine.zero: 3 and engine.micro_batch: 1 would hold it" in refused(wan, "stage2", 55)
    assert "one sample alone takes 86.1: use a larger device, or a smaller model, video" in refused(wan, "stage2", 10)
    assert "use engine.micro_batch: 2, or compute.checkpointing: true" in refused(tiny, "stage2", 0.09)
    large = tiny.model_copy(update={"video": tiny.video.model_copy(update={"height": 512, "width": 512})})
    lean = forecast.estimate_checkpointed(large, "stage2")
    assert lean and "use compute.checkpointing: true and engine.micro_batch: 1" in refused(large, "stage2", 1.01 * lean.peak(1) / GIB)
    for text in (message, refused(tiny, "stage2", 0.09)):
        assert text.count("\n") == 0


def test_what_the_refusal_proposes_fits(wan: schema.Params) -> None:
    one = forecast.estimate_needs(wan)["stage2"]
    fit.refuse_memory("stage2", one, None, 139 * GIB, "machine", fit.WorkSplit.from_engine(wan.engine, one.batch, 1))
    assert fit.WorkSplit.from_engine(wan.engine, one.batch, 8) == fit.WorkSplit(1, 2, 8), "as the profile states it"
    with pytest.raises(ValueError, match=r"a rank of stage2 of 8 with ZeRO 2 needs about 68.9.* one sample alone takes 86.1"):
        fit.refuse_memory("stage2", one, None, 42.0 * GIB, "GPU", fit.WorkSplit.from_engine(wan.engine, one.batch, 8))


def test_rollouts_that_outlive_a_step_are_counted_for_the_whole_share(wan: schema.Params) -> None:
    shared = wan.model_copy(update={"stage2": replace(wan.stage2, rollouts="shared")})
    each, kept = (forecast.estimate_needs(p)["stage2"] for p in (wan, shared))
    assert kept.peak(1, 2, 8) - each.peak(1, 2, 8) == 7 * kept.carried > 7 * each.memory
    assert kept.peak(8, 2, 8) == each.peak(8, 2, 8), "computed at once they are there anyway"


def test_what_is_offloaded_is_not_on_the_gpu(wan: schema.Params) -> None:
    one, engine = forecast.estimate_needs(wan)["stage2"], replace(wan.engine, offload="optimizer")
    away, here = (fit.WorkSplit.from_engine(stated, one.batch, 8, gpu=True) for stated in (engine, wan.engine))
    assert here.peak(one) - away.peak(one) == one.states(2, 8)["optimiser"] > 3 * GIB
    assert fit.WorkSplit.from_engine(engine, one.batch, 8) == fit.WorkSplit(1, 2, 8), "on a CPU it is the same memory"


def test_a_full_disk_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10 * GIB))
    written = {"out": 5.0 * GIB, "checkpoints": 5.0 * GIB}
    fit.refuse_disk("base", written, tmp_path / "models/base", tmp_path / "work/base")
    message = r"base writes up to 25\.0 GiB, but the disk of .* has 10\.0 free; free some"
    with pytest.raises(ValueError, match=message):
        fit.refuse_disk("base", written | {"checkpoints": 20.0 * GIB}, tmp_path / "models/base", tmp_path / "work/base")
    (tmp_path / "work/base/key").mkdir(parents=True)
    with (tmp_path / "work/base/key/step-00000001.safetensors").open("wb") as file:
        file.truncate(15 * GIB)  # of a run that goes on: it will be written over
    fit.refuse_disk("base", written | {"checkpoints": 20.0 * GIB}, tmp_path / "models/base", tmp_path / "work/base")


def test_a_stage_is_refused_before_it_leaves_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_bytes(TINY.read_bytes())
    Path("dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    monkeypatch.setattr(hardware, "measure_memory", lambda: 0.01 * GIB)
    for path in ("data/latents", "models/codec"):  # what the stage reads is looked for first
        Path(path).mkdir(parents=True)
    words = ["base", "--latents", "data/latents", "--codec", "models/codec", "--out", "models/base"]
    with pytest.raises(Refused, match=r"base needs about 0\.06.*CF_IGNORE_PLAN=1 starts it all the same"):
        cf.main(words)
    assert {path.name for path in tmp_path.iterdir()} == {"params.yaml", "dvc.yaml", "data", "models"}
    assert not Path("models/base").exists()
    monkeypatch.setenv("CF_IGNORE_PLAN", "1")
    with pytest.raises(ValueError, match=r"data/latents has no index\.parquet"):
        cf.main(words)


def test_memory_is_the_machines_or_the_containers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hardware, "count_gpus", lambda: 0)
    assert 0.05 * GIB < hardware.measure_memory() < 2**60
    limit, used = tmp_path / "max", tmp_path / "current"
    limit.write_text(f"{3 * 2**20}\n")
    used.write_text(f"{2**20}\n")
    monkeypatch.setattr(hardware, "CGROUPS", ((str(limit), str(used)),))
    assert hardware.measure_memory() == 2 * 2**20
    limit.write_text("max\n")
    assert hardware.measure_memory() > 2**20


def test_only_stages_that_train_are_asked(tiny: schema.Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "measure_memory", lambda: 1.0)
    plan.refuse_unfit_stage(tiny, "evaluate", tmp_path, tmp_path)
    assert set(forecast.estimate_needs(tiny)) == set(TRAINING_STAGES)
    assert all(isinstance(one, StageNeed) for one in forecast.estimate_needs(tiny).values())
