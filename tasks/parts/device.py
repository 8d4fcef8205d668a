"""Where a stage computes."""

from __future__ import annotations

import torch


def choose_device() -> torch.device:
    """The GPU, if there is one that CUDA_VISIBLE_DEVICES lets us see."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
