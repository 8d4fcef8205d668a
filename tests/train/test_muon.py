"""Muon in a chosen precision against torch.optim.Muon, which fixes its own to bfloat16."""

from __future__ import annotations

import pytest
import torch

from cf_model.model.weights import choose_precision
from cf_model.train.trainer.muon import Muon, orthogonalize

SHAPES = [(16, 16), (16, 16), (16, 48), (48, 16)]


def train_matrices(optimizer: type[torch.optim.Optimizer], steps: int) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(7)
    weights = [torch.randn(shape, generator=rng).requires_grad_() for shape in SHAPES]
    chosen = optimizer(weights, lr=0.02, weight_decay=0.1)  # type: ignore[call-arg]
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=rng)
        chosen.step()
    return [weight.detach() for weight in weights]


def test_in_bfloat16_it_takes_the_steps_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cf_model.train.trainer.muon.choose_precision", lambda device: torch.bfloat16)
    for ours, theirs in zip(train_matrices(Muon, 3), train_matrices(torch.optim.Muon, 3), strict=True):
        # both round to bfloat16 in another order of operations, so a step of 0.02 x sqrt(rows / columns) may differ in its third digit
        assert (ours - theirs).abs().max() < 1e-3


def test_float32_is_torch_without_the_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # torch's iteration casts with `.bfloat16()`
    theirs = train_matrices(torch.optim.Muon, 5)
    for ours, other in zip(train_matrices(Muon, 5), theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=2e-6)


def test_a_cpu_never_computes_in_half_precision() -> None:
    assert choose_precision(torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8)])
def test_singular_values_come_near_one(shape: tuple[int, int, int]) -> None:
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(1)), torch.float32))
    assert values.min() > 0.3 and values.max() < 1.3


def test_a_matrix_without_a_gradient_is_left_alone() -> None:
    still, moved = torch.ones(4, 4, requires_grad=True), torch.ones(4, 4, requires_grad=True)
    moved.grad = torch.ones(4, 4)
    Muon([still, moved], lr=0.1).step()
    assert torch.equal(still, torch.ones(4, 4)) and not torch.equal(moved, torch.ones(4, 4))
