"""Sizes of a transformer, as params.yaml states them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of a transformer. Wan2.1-T2V-1.3B: 30 layers, 12 heads of 128, ffn 8960, freq 256, 1024 positions."""

    layers: int
    heads: int
    head_dim: int
    ffn: int
    freq: int
    positions: int  # rows of the RoPE table

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; use 1 or more")
        # RoPE turns pairs of channels, a share of them for each of time, row and column; the time embedding is cosines and sines.
        if self.head_dim % 2 or self.head_dim < 6:
            problem = f"head_dim is {self.head_dim}, but RoPE turns pairs of channels along three axes"
            raise ValueError(f"{problem}; use an even number of 6 or more")
        if self.freq % 2:
            raise ValueError(f"freq is {self.freq}, but each frequency has a cosine and a sine; use an even number")
