"""`cf check-model`: a folder is a whole model that fits params.yaml, or a sentence says what it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tasks.__main__ as cf
from cf_model.codec.codec_file import save_codec
from cf_model.codec.linear import LinearCodec
from cf_model.model import wan
from cf_model.model.sizes import ModelSpec
from tests.checkpoints import ORIGINAL

WEIGHTS = "diffusion_pytorch_model.safetensors"
SPEC = ModelSpec(layers=2, heads=2, head_dim=12, ffn=32, freq=16, positions=64)


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """Of profile tiny: 12 channels of the codec, 64 of the text."""
    wan.save_transformer(wan.build_transformer(SPEC, channels=12, text_channels=64, seed=0), tmp_path / "student")
    return tmp_path / "student"


def test_a_model_that_fits(student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cf.main(["check-model", str(student)])
    save_codec(LinearCodec(12, 8), student.parent / "codec")
    cf.main(["check-model", str(student.parent / "codec"), "--stage", "codec"])
    assert capsys.readouterr().out.count("is a whole model that fits params.yaml") == 2


def test_what_is_no_model_of_ours(student: Path) -> None:
    def refused(folder: Path, sentence: str, stage: str = "stage2") -> None:
        with pytest.raises(ValueError, match=sentence):
            cf.main(["check-model", str(folder), "--stage", stage])

    refused(Path("/etc"), "/etc holds no config.json, so it is no transformer")
    refused(student, "holds no codec.json", "codec")
    other = student.parent / "other"
    wan.save_transformer(wan.build_transformer(SPEC, channels=4, text_channels=64, seed=0), other)
    refused(other, "has in_channels 4, and by the section codec of params.yaml it must be 12")
    (other / "config.json").write_text(json.dumps(ORIGINAL))
    refused(other, "is of class WanModel, and must be of WanTransformer3DModel")
    save_codec(LinearCodec(4, 8), other)
    refused(other, "has channels 4, and by the section codec of params.yaml it must be 12", "codec")
    state = load_file(student / WEIGHTS)
    save_file({name: tensor for name, tensor in state.items() if name != "proj_out.bias"}, student / WEIGHTS)
    refused(student, r"diffusion_pytorch_model\.safetensors: it lacks proj_out\.bias")
    save_file(state | {"proj_out.bias": torch.zeros(3)}, student / WEIGHTS)
    refused(student, "has the wrong shape for proj_out.bias as")
    with (student / WEIGHTS).open("r+b") as file:
        file.truncate(1000)
    refused(student, "is cut off or no safetensors file")
    (student / WEIGHTS).unlink()
    refused(student, "isn't there, so the folder is not whole")
