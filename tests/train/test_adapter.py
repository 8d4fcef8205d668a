"""LoRA of the teacher: what learns and what doesn't, and that merged and beside its base it is the same model."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cf_model.foreign import import_checkpoint
from cf_model.model import wan
from cf_model.train.adapter import LoraSpec, attach_lora
from tasks import teacher
from tasks.params import load
from tasks.runner.track import Track
from tests.small import SHAPE, denoiser, normal, write_clips

ROOT = Path(__file__).parents[2]
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
SPEC = LoraSpec(rank=2, alpha=4.0, targets=TARGETS)


def answer(model):
    with torch.no_grad():
        return model.velocity(normal(2, 3, *SHAPE), torch.tensor([0.5, 0.9]), normal(2, 5, 8))


def test_nothing_changes_yet_and_only_the_adapters_learn():
    model, plain = denoiser(), denoiser()
    before = torch.get_rng_state()
    attach_lora(model, SPEC, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    # A product of one piece with its activation, which an adapted layer is not, rounds in another way.
    assert torch.allclose(answer(model), answer(plain), rtol=1e-6, atol=1e-6)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning and all(".lora_" in name for name in learning)
    # self- and cross-attention: 4 layers each; two of the feed-forward; A and B of each, in two blocks
    assert len(learning) == 2 * 2 * (4 + 4 + 2)


def test_the_seed_alone_decides_how_it_starts():
    one, two, other = denoiser(), denoiser(), denoiser()
    for model, seed in ((one, 1), (two, 1), (other, 2)):
        attach_lora(model, SPEC, seed)
    firsts = [next(p for name, p in m.named_parameters() if "lora_A" in name) for m in (one, two, other)]
    assert torch.equal(firsts[0], firsts[1]) and not torch.equal(firsts[0], firsts[2])


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Latents and a base model of the smoke profile's sizes."""
    root = tmp_path_factory.mktemp("lora")
    stated = load.load_params(ROOT / "profiles/smoke.yaml")
    clips = [({"id": f"c{n}", "caption": "a disc", "split": "train"}, normal(46, 8, 4, 4, seed=n)) for n in range(2)]

    def text(captions):
        return normal(len(captions), 4, stated.text.channels)

    write_clips(root / "latents", clips, text)
    model = wan.build_transformer(stated.model, channels=8, text_channels=stated.text.channels, seed=1)
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    (root / "base").mkdir()
    wan.save_transformer(model, root / "base")
    return root, stated


def run(project, folder, lora, **changes):
    root, stated = project
    spec = replace(stated.teacher, steps=4, save_every=2, lora=lora, **changes)
    for name in ("work", "out"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    track, quiet = Track("teacher", folder / "work"), replace(stated.samples, teacher=replace(stated.samples.teacher, every=0))
    paths = {"latents": root / "latents", "codec": root / "none", "base": root / "base", "out": folder / "out"}
    teacher.run(stated.model_copy(update={"teacher": spec, "samples": quiet}), track, **paths)
    return folder / "out"


def seen(folder):
    x, text = normal(1, 6, 8, 4, 4), normal(1, 4, 64)
    with torch.no_grad():
        return wan.load_transformer(folder).velocity(x, torch.tensor([0.7]), text)


def test_merged_and_beside_its_base_it_is_the_same_model(project, tmp_path):
    out = run(project, tmp_path / "one", SPEC)
    base = load_file(project[0] / "base/diffusion_pytorch_model.safetensors")
    merged = load_file(out / "diffusion_pytorch_model.safetensors")
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert len(changed) == 2 * (4 + 4 + 2) and all(any(t in name for t in TARGETS) for name in changed)
    (tmp_path / "again").mkdir()
    facts = import_checkpoint.import_transformer(out / "adapter", tmp_path / "again", base=project[0] / "base")
    assert facts["lora"]["rank"] == 2 and facts["lora"]["alpha"] == 4.0
    assert torch.equal(seen(tmp_path / "again"), seen(out))
    assert not torch.equal(seen(project[0] / "base"), seen(out))


def test_peft_reads_the_adapter_and_answers_as_the_merged_model(project, tmp_path):
    from peft import LoraConfig, PeftModel

    out = run(project, tmp_path, SPEC)
    assert LoraConfig.from_pretrained(out / "adapter").r == 2
    with_adapter = wan.load_transformer(project[0] / "base")
    PeftModel.from_pretrained(with_adapter.transformer, out / "adapter")  # in place
    x, text = normal(1, 6, 8, 4, 4), normal(1, 4, 64)
    with torch.no_grad():
        assert torch.allclose(with_adapter.velocity(x, torch.tensor([0.7]), text), seen(out), atol=1e-5)


def test_a_rerun_gives_the_same_bytes_and_so_does_a_resumed_one(project, tmp_path, monkeypatch):
    one = run(project, tmp_path / "one", SPEC)
    real, calls = teacher.TeacherTrainer.step, []

    def dies(self, number):
        calls.append(number)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, number)

    monkeypatch.setattr(teacher.TeacherTrainer, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        run(project, tmp_path / "two", SPEC)
    two = run(project, tmp_path / "two", SPEC)
    assert calls == [0, 1, 2, 3, 2, 3]
    for file in sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file()):
        assert (one / file).read_bytes() == (two / file).read_bytes(), file
    assert {"errors.safetensors", "errors.json", "layout.json"} <= {path.name for path in one.iterdir()}


def test_without_lora_every_weight_learns(project, tmp_path):
    nothing = LoraSpec(rank=None, alpha=None, targets=None)
    out = run(project, tmp_path, nothing)
    assert not (out / "adapter").exists()
    base, made = (load_file(at / "diffusion_pytorch_model.safetensors") for at in (project[0] / "base", out))
    assert not [name for name in base if torch.equal(base[name], made[name])]
    assert json.loads((out / "layout.json").read_text())["target"] == 21


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"alpha": None}, r"rank is 2, alpha None, .*; state all three, or none to train every weight"),
        ({"rank": None, "targets": None}, "state all three"),
        ({"rank": 0}, "rank is 0; use 1 or more"),
        ({"targets": ()}, "nothing would learn"),
    ],
)
def test_half_a_lora_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        replace(SPEC, **values)


def test_a_target_that_is_not_there_is_named():
    words = r"teacher\.lora\.targets has ffn\.0, but no linear layer's name ends so; in a block there are .*ffn\.net\.2"
    with pytest.raises(ValueError, match=words):
        attach_lora(denoiser(), replace(SPEC, targets=("to_q", "ffn.0")), 1)


def test_no_peft_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"teacher\.lora\.rank is 2, but the package peft is not installed; install it"):
        attach_lora(denoiser(), SPEC, 1)
