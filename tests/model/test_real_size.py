"""Wan2.1-T2V-1.3B itself, with random weights, on a small picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cf_model.model import wan
from cf_model.model.memory import empty_memory
from cf_model.model.sizes import ModelSpec
from tasks.params import yaml_file
from tests.small import normal, spec

ROOT = Path(__file__).parents[2]
SPEC = ModelSpec(**yaml_file.read_yaml(ROOT / "profiles/wan-1.3b.yaml")["model"])


def available() -> float:
    """GB of memory that a new process can have; without Linux's own word, as much as there is room for in a test."""
    said = Path("/proc/meminfo")
    lines = said.read_text().splitlines() if said.exists() else ["MemAvailable: 99999999 kB"]
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 1e6


@pytest.mark.slow
@pytest.mark.skipif(available() < 10, reason=f"the 1.3B model needs 10 GB of free memory, {available():.1f} GB are")
@torch.no_grad()
def test_one_chunk_of_wan_1_3b_runs_with_a_memory() -> None:
    """6 GB and half a minute on one core, most of it for drawing the weights."""
    model = wan.build_transformer(SPEC, channels=16, text_channels=4096, seed=0).eval()
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    assert sum(weight.numel() for weight in model.parameters()) == 1_418_996_800

    text, sigma = normal(1, 512, 4096, seed=2), torch.tensor([0.9])
    memory = model.remember(normal(1, 3, 16, 8, 8, seed=3), text, empty_memory(spec()))
    assert memory.frame_count == 3 and all(len(frame.keys) == 30 and frame.keys[0].shape == (1, 16, 12, 128) for frame in memory.sink)

    noise = normal(1, 3, 16, 8, 8)
    x_0 = model(noise, sigma, text, memory)
    assert x_0.shape == noise.shape and x_0.isfinite().all() and x_0.std() > 0.1
    assert (x_0 - model(noise, sigma, text)).abs().max() > 1e-3, "what is remembered is looked at"
