"""A CPU computes in float32: most processors only emulate bfloat16 and float16, at a twentieth of the speed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.portability import STAGES, build_stage
from tasks.params.load import load_params

ROOT = Path(__file__).parent.parent
HALF = (torch.bfloat16, torch.float16)
# The small tests of the half-precision path itself: its dtypes, its files, its memory, and its names.
OF_THAT_PATH = {
    "tests/breaks.py",
    "tests/data/test_latents.py",
    "tests/model/test_denoiser.py",
    "tests/model/test_fast_paths.py",
    "tests/model/test_umt5.py",
    "tests/model/test_wan_codec.py",
    "tests/test_half_precision.py",
    "tests/test_import_lora.py",
    "tests/test_import_weights.py",
    "tests/test_kept.py",
    "tests/test_params.py",
    "tests/test_wan_stages.py",
    "tests/train/test_cost.py",
    "tests/train/test_erft.py",
    "tests/train/test_muon.py",
    "tests/train/test_wan_step.py",  # on meta tensors, which compute nothing
}


class HalfPrecision(TorchDispatchMode):
    """Records every operation that makes a tensor in half precision on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype in HALF and leaf.device.type == "cpu" for leaf in tree_leaves(result)):
            self.operations.add(str(func))
        return result


@pytest.mark.parametrize("stage", STAGES)
def test_no_training_stage_computes_in_half_precision_on_a_cpu(stage: str) -> None:
    trainer = build_stage(stage, "smoke")
    with HalfPrecision() as recorder:
        for number in range(2):  # an update of the student among them
            trainer.step(number)
    assert not recorder.operations


def test_the_recorder_sees_half_precision() -> None:
    with HalfPrecision() as recorder:
        torch.ones(2).bfloat16() @ torch.ones(2).bfloat16()
    assert any("dot" in operation for operation in recorder.operations)


@pytest.mark.parametrize("profile", ["tiny", "smoke"])
def test_the_profiles_for_cpus_ask_for_float32(profile: str) -> None:
    params = load_params(ROOT / f"profiles/{profile}.yaml")
    assert (params.compute.dtype, params.encode.dtype) == ("float32", "float32")
    assert params.teacher.errors is None or params.teacher.errors.dtype == "float32"


def test_only_small_tests_of_half_precision_mention_it() -> None:
    files = (file for file in (ROOT / "tests").rglob("*.py") if re.search(r"\b(bfloat16|float16|half\(\))", file.read_text()))
    mentioned = {file.relative_to(ROOT).as_posix() for file in files}
    assert mentioned <= OF_THAT_PATH, "use float32, or name the test in OF_THAT_PATH when half precision is what it tests"
