"""The benchmarks' own parts: the usual cache gives our numbers, the audit counts what operations do."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import audit, page, portability, steps
from benchmarks.common.kernels import count_kernels
from benchmarks.common.usual_cache import UsualStudent
from cf_model.model.context import build_plain_spec
from cf_model.model.memory import empty_memory
from cf_model.model.rollout import denoise_chunk
from tests.small import SHAPE, denoiser, normal

SIGMAS = [1.0, 0.9, 0.6]
LIMITS = json.loads((Path(__file__).parents[1] / "benchmarks/limits.json").read_text())


@pytest.mark.parametrize("sink", [0, 3])
@torch.no_grad()
def test_the_usual_cache_makes_the_videos_of_our_memory_at_absolute_positions(sink: int) -> None:
    """Eight chunks of two videos, of which five come after the window of nine frames has begun to forget."""
    model, text = denoiser(), normal(2, 5, 8, seed=4)
    usual, memory = UsualStudent(model, sink=sink, window=9), empty_memory(build_plain_spec(sink, 9 - sink, "absolute"))
    for number in range(8):
        noise = [normal(2, 3, *SHAPE, seed=100 * number + step) for step in range(len(SIGMAS))]
        ours, _, memory = denoise_chunk(model, text, SHAPE, SIGMAS, 3, memory, iter(noise))
        memory = model.remember(ours, text, memory)
        theirs = usual.make_chunk(noise, SIGMAS, text, 3 * number)
        assert torch.allclose(ours, theirs, rtol=0, atol=2e-5), f"chunk {number}: {(ours - theirs).abs().max()}"


def list_excesses(found: Mapping[str, Any], limits: Mapping[str, float]) -> list[str]:
    """Say of each number that is above its limit, how far."""
    return [f"{name} {found[name]}, at most {most}" for name, most in limits.items() if found[name] > most]


@pytest.mark.slow
def test_a_chunk_of_wan_moves_no_more_than_its_limits() -> None:
    """Whoever makes the code better lowers benchmarks/limits.json.

    One of these two chunks may join the slow part, which is more often than in the eight chunks of `python -m benchmarks audit`.
    """
    eager, parts = audit.audit_eager(chunks=2)
    assert not list_excesses(audit.describe(eager), LIMITS["eager"]), audit.describe(eager)["the_rest"]
    compiled = audit.extrapolate(*(small.count_compiled(tally) for small, tally in parts))
    assert not list_excesses(audit.describe(compiled), LIMITS["compiled"]), audit.describe(compiled)["the_rest"]


def test_the_audit_counts_what_operations_read_and_write() -> None:
    """A product, a sum in float64, a slice that costs nothing, writes in place, and a row that is looked up."""

    def run() -> None:
        a @ b
        wide + wide
        a[1:]
        a[:2].copy_(b[:2])
        a[torch.tensor([0])]
        a[row] = b[:1]
        b.expand(3, 4, 4).clone()

    with FakeTensorMode():
        a, b, wide = torch.ones(4, 4), torch.ones(4, 4), torch.ones(2, dtype=torch.float64)
        row = torch.tensor([0])
        tally = count_kernels(run)
    bytes_of = {name: count.bytes for name, count in tally.counts.items()}
    assert bytes_of == {"mm": 3 * 64, "add": 3 * 16, "copy": 2 * 32, "index": 8 + 16 + 16, "index_put": 8 + 16 + 16, "clone": 64 + 3 * 64}
    assert tally.total("kernels") == 6 and tally.total("wide_bytes") == 48 and tally.uploads == 1 and tally.host_reads == 0


def test_a_host_read_of_a_tensor_is_counted() -> None:
    tally = count_kernels(lambda: torch.ones(1).item())
    assert tally.host_reads == 1


def test_the_page_of_speed_shows_the_committed_results() -> None:
    assert page.PAGE.read_text() == page.write_page(), "run `python -m benchmarks page`"


@pytest.mark.parametrize("name", sorted(file.stem for file in Path(page.__file__).parent.glob("*.py") if not file.stem.startswith("_")))
def test_a_benchmark_finds_what_it_measures(name: str) -> None:
    """Nothing else imports the benchmarks, so a function that moved would be missed when somebody wants its time."""
    assert callable(importlib.import_module(f"benchmarks.{name}").main)


def test_a_step_can_be_built_with_every_setting_that_is_timed() -> None:
    for name, change in steps.SETTINGS.items():
        assert steps.job(change).spec.student_updates, name
    for stage in portability.STAGES:
        assert float(portability.build_stage(stage).step(0)["loss" if stage in ("base", "teacher", "causal_init") else "critic_loss"]) > 0
