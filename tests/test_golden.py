"""`cf check-golden`: the peers' own numbers, a folder of other sizes, and that wrong numbers fail."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tasks.__main__ as cf
from cf_model.golden.check import compare_case, list_cases
from cf_model.golden.vectors import BrokenVectors, GoldenVectors
from tasks.commands.check_golden import check_folder
from tests.golden_writer import CONFIG, Setting, Writer
from tests.wan_reference import Wan, weights

GIVEN = Path(__file__).parent / "golden/wan-causal"
SETTINGS = {
    "causal_global": Setting(99, 0),
    "causal_global_per_frame_t": Setting(99, 0),
    "causal_w4_s1": Setting(4, 1),
    "causal_w6_s2": Setting(6, 2),
    "ll_abs_w4_s2": Setting(4, 2),
    "ll_rel_w6_s2": Setting(6, 2, relative=True),
}
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other sizes, chunks, windows, levels, shift and seed than the vectors given."""
    writer = Writer(CONFIG, SETTINGS)
    writer.model_cases()
    writer.schedule()
    writer.distribution_matching()
    writer.rollout("roll_global", Setting(99, 0))
    writer.rollout("roll_w4_s2", Setting(4, 2))
    folder = tmp_path_factory.mktemp("golden")
    writer.write(folder)
    return folder


@pytest.fixture
def copy(other: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(other, tmp_path / "golden"))


def change(folder: Path, edit: Callable[[Arrays], None], file: str = "selfforcing.npz") -> None:
    with np.load(folder / file) as stored:
        arrays = dict(stored)
    edit(arrays)
    np.savez(folder / file, **arrays)


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    return {line[:28].strip(): line[37:].strip() for line in capsys.readouterr().out.splitlines()}


@pytest.mark.slow
def test_the_vectors_given_pass(capsys: pytest.CaptureFixture[str]) -> None:
    check_folder(GIVEN)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 + 28 and all(line.endswith(" ok") for line in said[1:]), "every array is read and every case passes"


def test_a_folder_of_other_sizes_passes(other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_folder(other)
    *said, absent = capsys.readouterr().out.splitlines()
    assert len(said) == 1 + 18 and all(line.endswith(" ok") for line in said[1:])
    assert absent == f"not in {other}, so not checked: selfforcing"


def test_texts_of_another_width_than_the_models_pass(copy: Path) -> None:
    """Stub scores look at the mean of the texts: the model's text width is no matter to them."""

    def widen(arrays: Arrays) -> None:
        for name in ("dmd.cond", "dmd.uncond"):
            arrays[name] = np.concatenate([arrays[name], arrays[name]], axis=-1)

    change(copy, widen)
    assert all(passes(copy, case) for case in ("dmd levels", "dmd gradients", "dmd losses"))


def test_what_writes_that_folder_is_the_peers_model_too() -> None:
    config = json.loads((GIVEN / "meta_selfforcing.json").read_text())["config"]
    stored, ours = load_file(GIVEN / "weights_selfforcing_keys.safetensors"), weights(config)
    assert stored.keys() == ours.keys() and all(torch.equal(stored[name], ours[name]) for name in stored)
    with np.load(GIVEN / "selfforcing.npz") as arrays:
        x, t, text, out = (torch.from_numpy(arrays[name])[1] for name in ("bi.x", "bi.t", "text.padded", "bi.out"))
    frames = x.shape[1]
    everything, times = torch.ones(frames, frames, dtype=torch.bool), torch.arange(frames).expand(frames, frames)
    made, _ = Wan(config, ours)(x.transpose(0, 1), t.expand(frames), text, everything, times)
    assert torch.allclose(made.float().transpose(0, 1), out, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def passes(folder: Path, case: str) -> bool:
    """One case only."""
    golden = GoldenVectors(folder)
    [result] = [compare_case(*one) for name, *one in list_cases(golden, golden.load_model()) if name == case]
    return not result.culprit


# case -> the array of it that gets one wrong number
WRONG = {
    **{"text": "text.padded", "bi": "bi.out", "diffusers": "diffusers.bi250.out", "mask": "mask.teacher_forcing_out"},
    **{"causal_global": "causal_global.cache.layer1.v", "causal_global_per_frame_t": "causal_global_per_frame_t.chunk0.clean_out"},
    **{"causal_w4_s1": "causal_w4_s1.chunk4.noisy_out", "causal_w6_s2": "causal_w6_s2.cache.layer1.k_roped"},
    **{"roll_global": "roll_global.latents", "roll_w4_s2": "roll_w4_s2.latents", "sched": "sched.euler_step"},
    **{"dmd gradients": "dmd.grad_raw", "dmd losses": "dmd.loss_b.value"},
}


def test_one_wrong_number_fails(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def edit(arrays: Arrays) -> None:
        for name in WRONG.values():
            arrays[name].reshape(-1)[-1] += 1e-2

    change(copy, edit)
    with pytest.raises(ValueError, match=r"13 of .* cases differ by more than their tolerance: text, bi, "):
        check_folder(copy)
    failed = {case: line.split()[-1] for case, line in lines(capsys).items() if "FAIL at" in line}
    assert failed == WRONG


@pytest.mark.parametrize(
    ("name", "value", "case"),
    [
        ("bi.out", np.nan, "bi"),
        ("dmd.loss_b.latent_grad", 0.0, "dmd gradients"),  # small numbers, for which nothing would be near enough
        ("dmd.loss_a.t_index", 500, "dmd levels"),
        ("causal_w6_s2.t_noisy", 710.0, "causal_w6_s2"),
        ("roll.renoise3", 0.0, "roll_w4_s2"),
    ],
)
def test_another_number_everywhere_fails(copy: Path, name: str, value: float, case: str) -> None:
    assert passes(copy, case)
    change(copy, lambda arrays: arrays[name].fill(value))
    assert not passes(copy, case)


def test_a_wrong_memory_or_position_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {
        "causal_global": Setting(99, 0, late=1),
        "causal_w6_s2": Setting(6, 2, no_sink=True),
        "causal_w4_s1": Setting(4, 2),
        "causal_w4_s2": Setting(4, 1),
        "causal_w8_s2": Setting(6, 2),
        "ll_rel_w6_s2": Setting(6, 2),
        "ll_abs_w6_s2": Setting(6, 2, relative=True),
    }
    writer = Writer(CONFIG, wrong | {"causal_w6_s1": Setting(6, 1)})
    writer.model_cases()
    writer.write(tmp_path)
    for file in ("selfforcing.npz", "longlive_rel.npz"):
        change(tmp_path, lambda arrays: [arrays.pop(name) for name in list(arrays) if ".cache." in name], file)
    with pytest.raises(ValueError, match="7 of"):
        check_folder(tmp_path)
    said = lines(capsys)
    assert {case for case, line in said.items() if "FAIL at" in line} == set(wrong)
    assert all(float(said[case].split()[0]) > 0.01 for case in wrong), "far beyond what rounding does"


# ----------------------------------------------------------------------------------------------------- broken folders


def test_what_is_not_there_is_said(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "longlive_rel.npz").unlink()
    change(copy, lambda arrays: arrays.update(another=np.zeros(1)))
    check_folder(copy)
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == [f"not in {copy}, so not checked: selfforcing, ll_abs, ll_rel", f"in {copy}, but no case reads it: another"]


MISSING = {"text.padded": "text", "bi.x": "bi", "bi.out": "bi", "causal.noisy3": "causal_w4_s1", "mask.t": "mask"}
MISSING |= {"causal_global.chunk2.clean_out": "causal_global", "causal_global.t_noisy": "causal_global", "roll.renoise5": "roll_global"}
MISSING |= {"sched.euler_step.t": "sched", "dmd.loss_a.value": "dmd losses"}
SHAPED = {"bi.x": "bi", "bi.out": "bi", "causal.clean2": "causal_global", "causal_w6_s2.cache.layer1.v": "causal_w6_s2"}
SHAPED |= {"mask.t": "mask", "sched.noise": "sched", "dmd.uncond": "dmd gradients", "roll.renoise1": "roll_global"}


@pytest.mark.parametrize(("name", "case"), MISSING.items())
def test_a_missing_array_is_refused(copy: Path, name: str, case: str) -> None:
    change(copy, lambda arrays: arrays.pop(name))
    with pytest.raises(BrokenVectors, match=f"array {name} is in no .npz file of .*, and others there need it; copy the folder as a whole"):
        passes(copy, case)


@pytest.mark.parametrize(("name", "case"), SHAPED.items())
def test_a_wrong_shape_is_refused(copy: Path, name: str, case: str) -> None:
    change(copy, lambda arrays: arrays.update({name: np.moveaxis(arrays[name], 1, -1)[..., :1]}))
    with pytest.raises(BrokenVectors, match=rf"array {name} of .*selfforcing.npz has shape \[.*\], and only \[.*\] fits"):
        passes(copy, case)


def weights_without(folder: Path) -> None:
    file = folder / "weights_selfforcing_keys.safetensors"
    state = load_file(file)
    state.pop("blocks.1.ffn.0.bias")
    save_file(state, file)


def truncated(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-200])


def stated(**changes: object) -> Callable[[Path], object]:
    return lambda folder: (folder / "meta_selfforcing.json").write_text(json.dumps({"config": CONFIG | changes}))


def gone(pattern: str) -> Callable[[Path], object]:
    return lambda folder: [file.unlink() for file in folder.glob(pattern)]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (gone("weights*"), "weights_selfforcing_keys.safetensors isn't there; copy the folder as a whole"),
        (gone("keymap*"), "keymap_selfforcing_to_diffusers.json isn't there; copy the folder as a whole"),
        (gone("meta*"), "holds no meta_*.json with a config"),
        (gone("*.npz"), "holds no .npz file, so there is nothing to check"),
        (weights_without, "is not the model of meta_*.json's config: it lacks blocks.1.ffn.net.0.proj.bias; "),
        (truncated("weights_selfforcing_keys.safetensors"), "weights_selfforcing_keys.safetensors can't be read ("),
        (truncated("selfforcing.npz"), "selfforcing.npz can't be read ("),
        (stated(num_heads=None), "config states no usable sizes: num_attention_heads is None"),
        (stated(ffn_dim=96), "it has the wrong shape for blocks.0.ffn.net.0.proj.bias as [80] for [96], "),
        (stated(patch_size=[1, 1, 1]), "it has the wrong shape for patch_embedding.weight as [48, 4, 1, 2, 2] for [48, 4, 1, 1, 1], "),
    ],
)
def test_a_broken_folder_is_one_sentence(copy: Path, damage: Callable[[Path], object], sentence: str) -> None:
    damage(copy)
    with pytest.raises(BrokenVectors, match=re.escape(sentence)) as refused:
        check_folder(copy)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("array", "code"), [("causal_global.chunk0.noisy_out", 1), ("bi.x", 2)])
def test_the_exit_code(copy: Path, array: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Success is 0, as everywhere."""
    change(copy, lambda arrays: arrays.pop(array) if code == 2 else arrays[array].fill(0.0))
    monkeypatch.setattr("sys.argv", ["cf", "check-golden", str(copy)])
    with pytest.raises(SystemExit) as left:
        cf.cli()
    said = capsys.readouterr().err
    assert left.value.code == code and said.startswith("cf check-golden: ") and said.count("\n") == 1
