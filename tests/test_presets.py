# Long: the traces, and how they are taken, are read together.
"""What each named method does in two optimiser steps and as it generates, against a table that a person has read.

`python tests/test_presets.py` writes the table anew; a change of it is a change of a method, and its commit says why.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from cf_model.model.denoiser import Denoiser  # noqa: E402
from cf_model.model.memory import empty_memory  # noqa: E402
from cf_model.model.rollout import place_window, rollout, stream  # noqa: E402
from cf_model.train.student import DistillationTrainer  # noqa: E402
from tasks.commands import preset  # noqa: E402
from tasks.params.load import validate_params  # noqa: E402
from tasks.params.schema import Params  # noqa: E402
from tasks.params.yaml_file import Refused, read_yaml  # noqa: E402
from tests.small import FLOW, SHAPE, denoiser, normal, places, queries  # noqa: E402

TABLE = ROOT / "tests/golden/presets.json"
NAMES = sorted(file.stem for file in (ROOT / "presets").glob("*.yaml"))
MARK = 1000.0  # of a latent that was encoded anew


def ranges(numbers: list[int]) -> str:
    """0 1 2 6 12 as "0-2 6 12"."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and parts[-1][-1] == n - 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return " ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts) or "-"


class Tracer:
    """Writes down every pass of every model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes: list[dict[str, Any]] = []
        inner = Denoiser._run_transformer

        def traced(model: Denoiser, x_t: Any, sigma: Any, text: Any, memory: Any, taken: Any, filled: Any = None, **more: Any) -> Any:
            one = {"model": id(model), "x": x_t, "sigma": sigma, "memory": memory, "filled": filled, "grad": torch.is_grad_enabled()}
            self.passes.append(one)
            return inner(model, x_t, sigma, text, memory, taken, filled, **more)

        monkeypatch.setattr(Denoiser, "_run_transformer", traced)

    def take(self) -> list[dict[str, Any]]:
        taken, self.passes = self.passes, []
        return taken


def seen(one: dict[str, Any]) -> str:
    """What a student's pass attends to, and where: "sink | slow | fast @ their positions, itself @ its own"."""
    memory, frames = one["memory"], one["x"].shape[1]
    parts = " | ".join(ranges(part) for part in memory.frame_indices().values())
    return f"{parts} @ {ranges(places(memory, frames))}, self @ {ranges(queries(memory, frames))}"


def lowered(one: dict[str, Any]) -> str:
    return f"{float(one['sigma'].flatten()[-1]):.3f}".rstrip("0").rstrip(".")


def chunk(passes: list[dict[str, Any]]) -> dict[str, str]:
    """The passes over one chunk: their noise levels in order, and what the first, the clean and the learning one saw."""
    made = [one for one in passes if not one["grad"]]
    row = {"levels": " ".join(map(lowered, made)), "sees": seen(made[0]), "kept_by": seen(made[-1])}
    clean = [one for one in made if not float(one["sigma"][0])]
    row["kept_by"] = seen(clean[0])
    learning = [one for one in passes if one["grad"]]
    if learning:
        row["learns"] = f"at {lowered(learning[0])}: {seen(learning[0])}"
        row["noise"] = noise(made, learning[0])
    return {key: value for key, value in row.items() if key != "kept_by" or value != row["sees"]}


def noise(made: list[dict[str, Any]], learning: dict[str, Any]) -> str:
    """Where the x_t of the learning pass came from: the way down from pure noise, or the chunk's own finished frames."""
    clean = next(i for i, one in enumerate(made) if not float(one["sigma"][0]))
    sources = {"the way down from pure noise": made[:clean], "its own x_0, noised again": made[clean + 1 :]}
    (source,) = (name for name, passes in sources.items() if any(torch.equal(one["x"], learning["x"]) for one in passes))
    return source


def train(name: str, tracer: Tracer) -> dict[str, Any]:
    params = parameters(name)
    stage = preset.read_preset(name)["student"]
    spec = getattr(params, stage)
    spec = type(spec)(**{**vars(spec), "batch": 1, "critic_updates": 1, "steps": 9, "ema_start": 0})
    view = spec.want_layout(params.teacher.view).view
    job = DistillationTrainer(
        spec,
        student=denoiser(0, positions=1024),
        teacher=denoiser(1, positions=1024),
        critic=denoiser(1, positions=1024),
        view=view,
        flow=FLOW,
        prompts=normal(3, 5, 8),
        null=torch.zeros(5, 8),
        shape=SHAPE,
        seed=5,
        reencode=lambda latents: torch.full_like(latents[:, -1:], MARK),
    )
    # the second step is one after the curriculum's end
    return {
        "settings": {
            "teacher": {"guidance": spec.teacher.guidance, "context_sigma": view.context_sigma, "errors": vars(params.teacher.errors)},
            "horizon": vars(spec.horizon),
            "critic_weight": spec.critic_weight,
            "cache_noise": spec.rollout.cache_noise,
            "betas": [[o.beta1, o.beta2] for o in (spec.student_optimizer, spec.critic_optimizer)],
        },
        "steps": [step(job, number, tracer, view) for number in (0, max(1, spec.horizon.decay))],
    }


def step(job: DistillationTrainer, number: int, tracer: Tracer, view: Any) -> dict[str, Any]:
    values = job.step(number)
    passes = tracer.take()
    mine = [one for one in passes if one["model"] == id(job.student)]
    frames, start = int(values["frames"]), int(values["window"])
    length = job.spec.rollout.window
    # the frames that a pass works on follow those that its memory has seen; a clean pass may be shown less of it
    chunks: dict[int, list[dict[str, Any]]] = {}
    for one in mine:
        chunks.setdefault(one["memory"].frame_count, []).append(one)
    teacher = [one for one in passes if one["model"] == id(job.teacher)]
    critic = [one for one in passes if one["model"] == id(job.critic)]
    shown = teacher[0]["filled"]  # which of the frames that it is shown this video has
    context = view.context_frames(start)
    if view.context == "memory":  # what the student remembered before the window's first pass
        context = sorted(frame for part in chunks[start][0]["memory"].frame_indices().values() for frame in part)
        assert shown is None or int(shown.sum()) == len(context) + length
    learns = [first for first, rows in chunks.items() if any(one["grad"] for one in rows)]
    return {
        "rollout": f"{frames} frames, of which {3 * len(chunks)} are new; window {start}-{start + length - 1}",
        "gradient": f"{3 * len(learns)} of {length} frames: {ranges([f + i for f in sorted(learns) for i in range(3)])}",
        "early": exits(chunks, start),
        "scores": {
            "context": ranges(context),
            "passes": f"teacher {len(teacher)}, critic {len(critic)}, of {teacher[0]['x'].shape[1]} frames",
            "first latent": "re-encoded" if float(teacher[0]["x"][0, 0].std()) < 1e-6 or encoded(teacher[0]) else "as it is",
        },
        "chunks": {f"{first}-{first + 2}": chunk(rows) for first, rows in chunks.items() if first >= start - 3},
    }


def encoded(one: dict[str, Any]) -> bool:
    """Is the first latent the mark, clean or noised: then its mean lies far from 0."""
    return float(one["x"][0, 0].mean()) > 1.0


def exits(chunks: dict[int, list[dict[str, Any]]], start: int) -> str:
    """Levels that the chunks before the window took."""
    before = sorted({len([one for one in rows if float(one["sigma"][0])]) for first, rows in chunks.items() if first < start})
    return f"chunks before the window take {' or '.join(map(str, before))} levels" if before else "nothing before the window"


def generate(name: str, tracer: Tracer) -> list[str]:
    params = parameters(name)
    system = params.generate.systems[name]
    memory = system.memory or getattr(params, system.weights).memory
    student = denoiser(0, positions=1024)
    chunks = stream(
        student, normal(1, 5, 8), SHAPE, sigmas=[1.0, 0.5], chunk=3, memory=empty_memory(memory), rng=torch.Generator().manual_seed(1)
    )
    lines = []
    for _ in range(13):
        next(chunks)
        passes = tracer.take()
        lines.append(f"{seen(passes[-2])}; kept by {seen(passes[-1])}")
    return [f"weights of {system.weights}", *lines]


def parameters(name: str) -> Params:
    """wan-1.3b's, whose horizons are the papers'; with a threshold that small random models pass now and then."""
    stated = preset.apply_preset(read_yaml(ROOT / "profiles/wan-1.3b.yaml"), name)
    params = validate_params(stated, Path("params.yaml"))
    for stage in (params.causal_init, params.stage1, params.stage2):
        object.__setattr__(stage.memory, "tau", 0.88 if stage.memory.promote == "similarity" else stage.memory.tau)
    memory = params.generate.systems[name].memory
    if memory:
        object.__setattr__(memory, "tau", 0.88)
    return params


def trace(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(ROOT)
    tracer = Tracer(monkeypatch)
    return {"training": train(name, tracer), "generation": generate(name, tracer)}


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_does_what_its_table_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trace(name, monkeypatch) == json.loads(TABLE.read_text())[name]


def test_a_preset_is_laid_over_the_file_whose_comments_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file = tmp_path / "params.yaml"
    file.write_text((ROOT / "profiles/tiny.yaml").read_text())
    preset.write_preset(file, "infinity_rope")
    stated = read_yaml(file)
    steps = read_yaml(ROOT / "profiles/tiny.yaml")["stage1"]["steps"]
    assert "# of each of seven kinds" in file.read_text() and stated["stage1"]["steps"] == steps
    assert stated["stage1"]["memory"]["fast"] == 21
    system = validate_params(stated, Path("params.yaml")).generate.systems["infinity_rope"]
    assert system.weights == "stage1" and system.memory and (system.memory.sink, system.memory.fast) == (1, 5)
    preset.write_preset(file, "cf_default")  # a second preset undoes the first: what presets decide begins as the profile has it
    stated = read_yaml(file)
    assert validate_params(stated, Path("params.yaml")).stage2.memory.slow == 12
    assert stated == preset.apply_preset(read_yaml(ROOT / "profiles/tiny.yaml"), "cf_default"), "and its systems"


@pytest.mark.parametrize("profile", ["tiny", "smoke"])
def test_a_preset_takes_tau_guidance_and_sizes_from_the_profile(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an ablation of the paper can be run at any size: it differs from the profile in what the ablation is about."""
    monkeypatch.chdir(ROOT)
    plain = read_yaml(ROOT / f"profiles/{profile}.yaml")
    for name in ("cf_paper", "cf_no_cdmd", "cf_uniform_2", "cf_released", "longlive", "self_forcing_pp"):
        stated = preset.apply_preset(plain, name)
        for stage in ("stage1", "stage2"):
            assert stated[stage]["teacher"]["guidance"] == plain[stage]["teacher"]["guidance"]
            assert stated[stage]["memory"]["tau"] == plain[stage]["memory"]["tau"]
            assert stated[stage]["horizon"]["longest"] == plain[stage]["horizon"]["longest"]
            assert stated[stage]["batch"] == plain[stage]["batch"]


def test_cf_default_is_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for profile in ("tiny", "smoke", "small", "wan-1.3b"):
        plain = read_yaml(ROOT / f"profiles/{profile}.yaml")
        stated = preset.apply_preset(plain, "cf_default")
        assert {key: value for key, value in stated.items() if key != "generate"} == {k: v for k, v in plain.items() if k != "generate"}


def test_what_a_preset_changes_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    file = tmp_path / "params.yaml"
    file.write_text((ROOT / "profiles/tiny.yaml").read_text())
    preset.main(["use", "self_forcing_pp", "--params", str(file)])
    said = capsys.readouterr().out.splitlines()
    changes = ("memory.slow: 12 -> 0", "rollout.place: last -> uniform", "horizon.mode: linear -> const")
    assert {f"  stage2.{change}" for change in changes} <= set(said)
    assert not [line for line in said if "tau" in line or "guidance" in line or "steps" in line]


def test_the_papers_mistakes_are_in_the_context_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sec. 3.4: X + I e_drift on X_1:k. What the release adds to the target and to the noise is cf_released's."""
    errors = parameters("cf_paper").teacher.errors
    assert (errors.latent, errors.noise, errors.segments) == (0.0, 0.0, "all") and errors.context > 0
    assert parameters("cf_released").teacher.errors.latent == 0.9


@pytest.mark.parametrize(("name", "mean", "below"), [("self_forcing_pp", 47.25, 0.5), ("self_forcing_pp_beta", 31.5, 0.75)])
def test_the_window_of_self_forcing_pp_is_where_the_paper_draws_it(name: str, mean: float, below: float) -> None:
    """Uniform over 100 s, or Beta(1, 2): the mean start in seconds, and the share of windows that begin in the first half."""
    spec = parameters(name).stage2
    draw = torch.Generator().manual_seed(1)
    lengths = {spec.horizon.sample_length(step, 3, draw) for step in range(0, 500, 50)}
    assert lengths == {399}, "every rollout has the whole length"
    starts = torch.tensor([place_window(399, spec.rollout, draw) for _ in range(4000)])
    last = 399 - spec.rollout.window
    assert float(starts.double().mean()) / 4 == pytest.approx(mean, abs=1.5)  # a latent frame is a quarter of a second
    assert float((starts <= last / 2).double().mean()) == pytest.approx(below, abs=0.03)
    assert int(starts.min()) == 0 and last - 12 <= int(starts.max()) <= last


@pytest.mark.parametrize("profile", ["tiny", "smoke", "wan-1.3b"])
@pytest.mark.parametrize("name", NAMES)
def test_every_preset_fits_the_profile(name: str, profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    validate_params(preset.apply_preset(read_yaml(ROOT / f"profiles/{profile}.yaml"), name), Path("params.yaml"))


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file = tmp_path / "params.yaml"
    short = (ROOT / "profiles/smoke.yaml").read_text().replace("longest: 24", "longest: 10", 1)
    short = short.replace("teacher: {context: memory,", "teacher: {context: none,")
    file.write_text(short)
    validate_params(read_yaml(file), file)  # a teacher of short contexts is fine where the student is shown none
    with pytest.raises(Refused, match=r"preset cf_default doesn't fit .* the teacher's begin at 10 at most.*; start from another profile"):
        preset.write_preset(file, "cf_default")
    assert file.read_text() == short
    with pytest.raises(Refused, match="preset cf isn't in presets/; known are cf_default, "):
        preset.write_preset(file, "cf")


def test_the_released_stage_1_never_teaches_the_first_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    spec = parameters("cf_released").stage1
    for seed in range(4):
        made = rollout(
            denoiser(),
            normal(1, 5, 8),
            21,
            SHAPE,
            spec=spec.rollout,
            memory=spec.memory,
            flow=FLOW,
            rng=torch.Generator().manual_seed(seed),
        )
        assert [target.grad for target in made.targets] == [False] + [True] * 6
        assert made.exits[:2] == (3, 3)


def test_no_two_presets_are_the_same() -> None:
    table = json.loads(TABLE.read_text())
    assert sorted(table) == NAMES
    assert len({json.dumps(row, sort_keys=True) for row in table.values()}) == len(NAMES)


if __name__ == "__main__":
    rows = {}
    for name in NAMES:
        with pytest.MonkeyPatch.context() as patch:
            rows[name] = trace(name, patch)
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(json.dumps(rows, indent=1) + "\n")
