"""Counting of a computation's operations in matrix products, as PyTorch counts them."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_linear(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    """Return the operations of a linear layer, which PyTorch's counter does not know where the activation is computed with it."""
    return 2 * prod(x) * weight[0]


class OperationCounter(FlopCounterMode):
    """PyTorch's counter, which knows products that are fused with their activation too; silent."""

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: count_linear})
