"""The device that a stage computes on."""

from __future__ import annotations

import torch


def choose_device() -> torch.device:
    """Return the GPU, or the CPU if CUDA_VISIBLE_DEVICES leaves no GPU visible."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
