"""Which weights learn, which are averaged, and who uses which: small things that cost weeks when they are wrong."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cf_model.data.prompt_writer import write_prompts
from cf_model.model import checkpoint, wan
from cf_model.model.denoiser import Denoiser
from cf_model.model.flow import Flow
from cf_model.model.rollout import Rollout
from cf_model.model.view import TeacherView, guide_velocity
from cf_model.train import student
from cf_model.train.adapter import LoraSpec
from cf_model.train.teacher import TeacherTrainer
from cf_model.train.trainer.ema import EMA
from tasks import base, causal_init, stage1, teacher
from tasks.params import load, schema
from tasks.runner.track import Track
from tests.small import FLOW, SHAPE, denoiser, normal, restored, rng, rolling, write_clips
from tests.train import ranked

ROOT = Path(__file__).parents[2]
LORA = LoraSpec(rank=2, alpha=4.0, targets=("to_q", "to_k", "ffn.net.0.proj"))
NULL = normal(5, 8, seed=9)


def lora() -> tuple[Any, dict[str, Denoiser]]:
    job, _ = ranked.teacher()
    spec = replace(job.spec, lora=LORA, optimizer=replace(job.spec.optimizer, muon_lr=1e-3))
    made = TeacherTrainer(spec, model=denoiser(), latents=ranked.Clips(), flow=FLOW, seed=3)
    return made, {"model": made.model}


# -------------------------------------------------------------------------------------------------- what learns


@pytest.mark.parametrize("make", [ranked.base, ranked.teacher, lora, ranked.causal_init, ranked.student])
def test_optimisers_hold_what_should_learn_and_all_of_it_moves(make: Callable[[], tuple[Any, dict[str, Denoiser]]]) -> None:
    """Nothing frozen is in an optimiser, nothing that learns is missing or there twice, and no other model is touched."""
    job, models = make()
    names = {"student": "student_optimizer", "critic": "critic_optimizer", "model": "optimizer"}
    averages = [p for p in job.ema.model.parameters()]
    assert not any(p.requires_grad for p in averages)
    fixed = {"teacher": job.teacher} if "student" in models else {}
    before = {name: [p.detach().clone() for p in model.parameters()] for name, model in (models | fixed).items()}
    for name, model in models.items():
        parts = getattr(job, names[name]).parts
        held = [id(p) for part, _ in parts for group in part.param_groups for p in group["params"]]
        learning = [id(p) for p in model.parameters() if p.requires_grad]
        assert sorted(held) == sorted(learning) and learning, name
        assert len(learning) == len(list(model.parameters())) or make is lora
    for number in range(4):  # LoRA's A moves from the second step on, when B is no longer 0
        job.step(number)
    for name, model in models.items():
        still = {n for (n, p), old in zip(model.named_parameters(), before[name], strict=True) if torch.equal(p, old)}
        frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
        assert still == frozen, name
        assert bool(frozen) == (make is lora)
    for name, model in fixed.items():
        assert all(torch.equal(p, old) and not p.requires_grad for p, old in zip(model.parameters(), before[name], strict=True))


# ------------------------------------------------------------------------------------- averaged weights and raw ones


def test_rollouts_and_scores_use_the_raw_weights() -> None:
    """An average of nonsense changes no number of a step, and no weight; weights of nonsense do."""
    one, other, wrong = (ranked.student()[0] for _ in range(3))
    with torch.no_grad():
        for p in other.ema.model.parameters():
            p.fill_(1000.0)
        wrong.student.transformer.proj_out.bias.add_(1.0)
    told = [[job.step(number) for number in range(2)] for job in (one, other, wrong)]
    made = [[{name: value for name, value in row.items() if name != "ema_distance"} for row in rows] for rows in told]
    assert made[0] == made[1] and made[0] != made[2]
    assert all(torch.equal(p, q) for p, q in zip(one.student.parameters(), other.student.parameters(), strict=True))


@pytest.mark.parametrize("persist", ["fresh", "stream"])
def test_with_rollouts_of_its_own_the_student_learns_first(persist: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-Forcing's order: the student's update on a rollout of its own, then the critic's on one by the student that it has become."""
    plan: dict[str, Any] = {"rollout": rolling(levels=(1.0, 0.5), window=6, full_first=1, skip_first=1, persist=persist)}
    made, whose = list[Tensor](), list[Tensor]()
    inner = student.rollout

    def note(model: Denoiser, *given: Any, **more: Any) -> Rollout:
        whose.append(model.transformer.proj_out.weight.detach().clone())
        generated = inner(model, *given, **more)
        made.append(generated.video)
        return generated

    monkeypatch.setattr(student, "rollout", note)
    if persist == "stream":  # whose windows begin before what the memory holds by then
        plan |= {"teacher": student.ScoreSpec("sparse", 2.0, "apart", "refuse", "as_is")}
    job, _ = ranked.student(plan | {"rollouts": "own", "critic_updates": 2})
    job.step(0)
    assert len(made) == 1, "a step of the critic alone"
    values = job.step(1)
    assert len(made) == 3 and torch.equal(whose[0], whose[1]) and not torch.equal(whose[1], whose[2])
    assert made[1].shape != made[2].shape or not torch.equal(made[1], made[2])
    assert {"student_loss", "student_gradient", "critic_loss", "critic_gradient", "promotion"} <= values.keys()
    assert values["frames"] == made[2].shape[1], "the log is of the critic's rollout"


def test_what_the_critic_learns_from_its_own_rollouts_is_no_students_affair() -> None:
    """Until the student's first update `own` and `each` are the same, number for number."""
    own, each = (ranked.student({"rollouts": kind, "critic_updates": 3})[0] for kind in ("own", "each"))
    assert [own.step(number) for number in range(2)] == [each.step(number) for number in range(2)]
    assert own.step(2)["student_loss"] == each.step(2)["student_loss"], "and that update sees the rollout that it would have seen"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, schema.Params]:
    """Latents and a base model of the smoke profile's sizes."""
    root = tmp_path_factory.mktemp("roles")
    stated = load.load_params(ROOT / "profiles/smoke.yaml")
    clips = [({"id": f"c{n}", "caption": "a disc", "split": "train"}, normal(46, 8, 4, 4, seed=n)) for n in range(2)]

    def text(captions: list[str]) -> Tensor:
        return normal(len(captions), 4, stated.text.channels)

    write_clips(root / "latents", clips, text)
    write_prompts(root / "prompts", ["a disc"], text, shard_mib=1.0, dtype=torch.float32)
    (root / "base").mkdir()
    model = wan.build_transformer(stated.model, channels=8, text_channels=stated.text.channels, seed=1)
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    wan.save_transformer(model, root / "base")
    return root, stated


@pytest.mark.parametrize("stage", ["base", "teacher", "lora", "causal_init", "stage1"])
def test_what_is_generated_with_is_the_average(
    stage: str, project: tuple[Path, schema.Params], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage's outcome has the mark that is put on the averaged weights alone."""
    root, stated = project
    section = "teacher" if stage == "lora" else stage
    spec = replace(getattr(stated, section), steps=2, save_every=2)
    spec = replace(spec, lora=LORA) if stage == "lora" else spec
    spec = replace(spec, method="teacher_forcing", longest=21) if stage == "causal_init" else spec
    quiet = replace(stated.samples, **{section: replace(getattr(stated.samples, section), every=0)})
    stated = stated.model_copy(update={section: spec, "samples": quiet})
    mark, update = 7.0, EMA.update

    def marked(self: EMA[Denoiser]) -> float:
        distance = update(self)
        with torch.no_grad():
            self.model.transformer.proj_out.bias.fill_(mark)
        return distance

    monkeypatch.setattr(EMA, "update", marked)
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    out.mkdir()
    track, paths = Track(section, work), {"latents": root / "latents", "codec": root / "none", "out": out}
    if stage == "base":
        base.run(stated, track, **paths)
    elif stage == "stage1":
        stage1.run(stated, track, **paths, prompts=root / "prompts", base=root / "base", causal_init=root / "base")
    elif stage == "causal_init":
        causal_init.run(stated, track, **paths, prompts=root / "prompts", base=root / "base")
    else:
        teacher.run(stated, track, **paths, base=root / "base")
    bias = load_file(out / "diffusion_pytorch_model.safetensors")["proj_out.bias"]
    assert torch.equal(bias, torch.full_like(bias, mark))


# --------------------------------------------------------------------------------- null prompt, guidance, noise levels


class Listener:
    """A score that notes what it is asked, and answers with the mean of the prompt."""

    def __init__(self) -> None:
        self.heard: list[Tensor] = []

    def velocity(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        self.heard.append(text)
        return torch.ones_like(x_t) * text.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)


def test_guidance_is_that_of_the_literature_and_self_forcings_plus_one() -> None:
    """null + g (cond - null): 1 is the prompt alone, 0 would be the null prompt; cond + 3.0 (cond - null) is g = 4.0."""
    text, x = normal(2, 5, 8), normal(2, 3, *SHAPE)
    view = TeacherView("none", 0, 0, 0, 1, 3, "zero", "joint")
    cond, null = (t.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1) * torch.ones_like(x) for t in (text, NULL.expand_as(text)))
    for passes in ("apart", "together"):
        score = Listener()
        four = guide_velocity(score, text, x[:, :0], view=view, guidance=4.0, null=NULL, passes=passes)(x, torch.tensor([0.5, 0.5]))
        assert torch.allclose(four, cond + 3.0 * (cond - null), atol=1e-5)
        assert torch.equal(torch.cat(score.heard), torch.cat([text, NULL.expand_as(text)]))
        one = guide_velocity(score, text, x[:, :0], view=view, guidance=1.0, null=NULL, passes=passes)(x, torch.tensor([0.5, 0.5]))
        assert torch.equal(one, cond)


def test_only_the_teacher_is_asked_with_the_null_prompt_and_it_is_the_stated_one(monkeypatch: pytest.MonkeyPatch) -> None:
    job, _ = ranked.student()
    job.null, heard = NULL, {"student": [], "teacher": [], "critic": []}  # type: ignore[var-annotated]
    for name, texts in heard.items():
        model = getattr(job, name)
        inside = model._run_transformer

        def listened(x: Tensor, sigma: Tensor, text: Tensor, *rest: Any, inside: Any = inside, texts: Any = texts, **more: Any) -> Tensor:
            texts.append(text)
            return inside(x, sigma, text, *rest, **more)

        monkeypatch.setattr(model, "_run_transformer", listened)
    for number in range(2):
        job.step(number)
    null = {name: [bool((text == NULL).all()) for text in texts] for name, texts in heard.items()}
    assert null["teacher"] == [False, True], "one update of the student: with the prompt, then without"
    assert not any(null["student"]) and not any(null["critic"]) and len(null["critic"]) == 3


def test_the_student_is_run_at_warped_levels_that_the_transformer_hears_times_1000() -> None:
    """Levels 1 and 0.5 at shift 5 are Wan's timesteps 1000 and 833.3, as numbers with a fraction; clean passes are at 0."""
    job, _ = ranked.student()
    heard: set[float] = set()
    job.student.transformer.register_forward_pre_hook(lambda _, given: heard.update(given[1].flatten().tolist()))
    for number in range(2):
        job.step(number)
    assert sorted(heard) == pytest.approx([0.0, 2500 / 3, 1000.0]) and Flow(5.0, 0.02, 0.98).shift_levels([0.5]) == pytest.approx([5 / 6])


def test_scores_look_at_warped_and_clamped_levels() -> None:
    """u uniform, then s u / (1 + (s - 1) u), then clamped: the same draws, whatever comes after them."""
    u = torch.rand(4000, generator=rng(1))
    flow = Flow(5.0, 0.1, 0.9)
    assert torch.allclose(flow.sample_score_sigma(4000, rng(1)), (5 * u / (1 + 4 * u)).clamp(0.1, 0.9))
    assert torch.allclose(flow.sample_sigma(4000, rng(1)), 5 * u / (1 + 4 * u))


# ------------------------------------------------------------------------------------------------------ strict loading


def test_nothing_is_loaded_but_strictly() -> None:
    """No call says strict=False, and no pickle is read that could build more than tensors."""
    said = []
    for file in [path for folder in ("cf_model", "tasks", "flows", "benchmarks") for path in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            given = {one.arg: getattr(one.value, "value", None) for one in node.keywords}
            lax = given.get("strict") is False or (name == "load_state_dict" and len(node.args) > 1)
            if ("load" in name and lax) or (ast.unparse(node.func) == "torch.load" and given.get("weights_only") is not True):
                said.append(f"{file.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)[:80]}")
    assert not said


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_weights_that_do_not_fit_are_refused_wherever_they_are_read(change: str, tmp_path: Path) -> None:
    """A model's folder, a checkpoint's model, and its average: a weight less, one more, one of another size."""

    def damaged(state: dict[str, Any]) -> dict[str, Any]:
        name = "transformer.proj_out.bias"
        rest = {key: value for key, value in state.items() if key != name}
        more = state | {"transformer.more": state[name].clone()}
        return {"missing": rest, "unknown": more, "shape": state | {name: state[name][:-1]}}[change]

    model = denoiser()
    with pytest.raises((RuntimeError, ValueError)):
        model.load_state_dict(damaged(model.state_dict()))
    average = EMA(model, 0.9)
    with pytest.raises((RuntimeError, ValueError)):
        average.load_state_dict({"done": 3, "model": damaged(average.model.state_dict())})

    checkpoint.save_checkpoint(tmp_path, 1, {"model": damaged(model.state_dict())})
    with pytest.raises((RuntimeError, ValueError)):
        restored(tmp_path, {"model": denoiser()})
    folder = tmp_path / "folder"
    folder.mkdir()
    wan.save_transformer(model, folder)
    inner = {key.removeprefix("transformer."): value for key, value in damaged(model.state_dict()).items()}
    save_file(inner, folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises((RuntimeError, ValueError)):
        wan.load_transformer(folder)
