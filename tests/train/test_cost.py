"""What `cf plan` computes, against PyTorch's own counting and against the published figures (docs/method.md, "Cost")."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cf_model.model import wan
from cf_model.model.denoiser import Compute, Denoiser
from cf_model.model.memory import empty_memory
from cf_model.model.rollout import HorizonSpec
from cf_model.model.sizes import ModelSpec
from cf_model.model.slow_part import SPARE
from cf_model.plan import forecast, need, passes
from cf_model.plan.cost import ModelCosts
from cf_model.plan.encoding import EncodingNeed, count_codec_operations
from cf_model.plan.hardware import Hardware
from tasks.params import load
from tests.operations import OperationCounter
from tests.small import normal, spec

ROOT = Path(__file__).parents[2]
TERA = 1e12
SMALL = ModelSpec(layers=3, heads=2, head_dim=12, ffn=40, freq=16, positions=64)


def small(dtype: str = "float32", checkpointing: bool = False) -> ModelCosts:
    compute = Compute("native", dtype, checkpointing, compiled=False, graphs=False, merged=False)  # type: ignore[arg-type]
    return ModelCosts(SMALL, channels=5, text_channels=7, text_tokens=6, height=6, width=4, compute=compute)


def model(costs: ModelCosts) -> Denoiser:
    made = wan.build_transformer(costs.model, channels=costs.channels, text_channels=costs.text_channels, seed=0, compute=costs.compute)
    torch.nn.init.normal_(made.transformer.proj_out.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return made


def inputs(costs: ModelCosts, frames: int, batch: int = 1, levels: int = 1) -> tuple[Any, Any, Any]:
    sigma = torch.full((batch, frames) if levels > 1 else (batch,), 0.5)
    x = normal(batch, frames, costs.channels, costs.height, costs.width)
    return x, sigma, normal(batch, costs.text_tokens, costs.text_channels)


@pytest.fixture(scope="module")
def wan_costs() -> ModelCosts:
    return forecast.estimate_costs(load.load_params(ROOT / "profiles/wan-1.3b.yaml"))


# -------------------------------------------------------------------------------------- against what PyTorch counts


@pytest.mark.parametrize("profile", ["tiny", "smoke", "small"])
def test_parameters_are_those_of_the_model(profile: str) -> None:
    costs = forecast.estimate_costs(load.load_params(ROOT / f"profiles/{profile}.yaml"))
    made = model(costs)
    assert costs.parameters == sum(p.numel() for p in made.parameters())
    assert costs.matrices == sum(p.numel() for name, p in made.named_parameters() if ".blocks." in name and p.ndim == 2)


@pytest.mark.parametrize(("frames", "seen", "per_frame"), [(6, 0, False), (3, 0, False), (3, 6, False), (6, 0, True)])
def test_operations_are_those_that_pytorch_counts(frames: int, seen: int, per_frame: bool) -> None:
    costs = small()
    made, levels = model(costs), frames * costs.tokens if per_frame else 1
    x, sigma, text = inputs(costs, frames, levels=levels)
    memory = None
    if seen:
        memory = empty_memory(spec(sink=0, slow=0, fast=3 + seen, promote="none"))
        for part in normal(1, seen, *x.shape[2:], seed=5).split(3, dim=1):
            memory = made.remember(part, text, memory)
        assert len(memory.frames) == seen  # type: ignore[union-attr]
    with sdpa_kernel(SDPBackend.MATH):
        with OperationCounter() as forward:
            velocity = made.velocity(x, sigma, text, memory)
        with OperationCounter() as backward:
            velocity.square().sum().backward()
    expected = costs.forward(frames, seen, levels)
    assert forward.get_total_flops() == expected.total
    # nothing is differentiated to the latents, the prompt and the noise level
    first = 2 * costs.dim * (frames * costs.tokens * 4 * costs.channels + costs.text_tokens * 7 + levels * SMALL.freq)
    assert backward.get_total_flops() == 2 * expected.total - first
    assert backward.get_total_flops() + expected.total == pytest.approx(expected.trained(False), rel=0.02)


def test_passes_without_gradient_read_a_prompt_once_and_remembering_ends_early() -> None:
    costs = small()
    made, (x, sigma, text) = model(costs), inputs(costs, 3)
    memory = made.remember(x, text, empty_memory(spec(sink=0, slow=0, fast=6, promote="none")))

    def count(work: Callable[[], object]) -> int:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), OperationCounter() as counted:
            work()
        return int(counted.get_total_flops())

    expected = costs.forward(3, 3)
    count(lambda: made.velocity(x, sigma, text, memory))
    assert count(lambda: made.velocity(x, sigma, text, memory)) == expected.repeated
    assert count(lambda: made.remember(x, text, memory)) == expected.remembered


def test_checkpointing_runs_the_blocks_once_more() -> None:
    def counted(checkpointing: bool) -> int:
        costs = small(checkpointing=checkpointing)
        with sdpa_kernel(SDPBackend.MATH), OperationCounter() as count:
            model(costs).train().velocity(*inputs(costs, 6)).square().sum().backward()
        return int(count.get_total_flops())

    again = small().forward(6).trained(True) - small().forward(6).trained(False)
    assert counted(True) - counted(False) == again


@pytest.mark.parametrize(("frames", "per_frame"), [(6, False), (3, False), (6, True)])
def test_what_a_pass_keeps_is_what_autograd_saves(frames: int, per_frame: bool) -> None:
    costs = small()
    made, levels = model(costs), frames * costs.tokens if per_frame else 1
    x, sigma, text = inputs(costs, frames, levels=levels)
    weights = {p.untyped_storage().data_ptr() for p in made.parameters()}
    saved: dict[int, int] = {}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        if (where := tensor.untyped_storage().data_ptr()) not in weights:
            saved[where] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = (made.velocity(x, sigma, text) - x).square().mean()
    assert loss.requires_grad and sum(saved.values()) == costs.saved_bytes(frames, levels=levels)


def test_a_remembered_frame_is_as_large_as_it_is() -> None:
    costs = small()
    x, _, text = inputs(costs, 3)
    memory = model(costs).remember(x, text, empty_memory(spec()))
    (frame,) = memory.sink[:1]  # type: ignore[union-attr]
    assert sum(t.numel() * t.element_size() for t in (*frame.keys, *frame.values)) == costs.frame_bytes()


# --------------------------------------------------------------------------------------------- published figures


def law(costs: ModelCosts, frames: int, seen: int = 0) -> float:
    """docs/method.md, "Cost", counts the blocks' products and attention, with the prompt's keys and values computed once a video."""
    made = costs.forward(frames, seen)
    return (made.linear + made.attention + made.cross) / TERA


def test_wan_has_its_published_size(wan_costs: ModelCosts) -> None:
    assert wan_costs.parameters == 1_418_996_800
    assert wan_costs.tokens == 1560
    assert wan_costs.frame_bytes() / 2**20 == pytest.approx(274.2, abs=0.05)
    assert 21 * wan_costs.frame_bytes() / 2**30 == pytest.approx(5.62, abs=0.005)
    assert wan_costs.forward(1).linear / 1560 == pytest.approx(2.5009e9, rel=1e-4)


def test_passes_cost_what_is_published(wan_costs: ModelCosts) -> None:
    for attended, tflop in ((6, 20.2), (12, 28.3), (21, 40.4)):
        assert law(wan_costs, 3, attended - 3) == pytest.approx(tflop, abs=0.05)
    for frames, tflop in ((21, 283), (42, 961), (105, 5370)):
        assert law(wan_costs, frames) == pytest.approx(tflop, abs=0.5)
    for frames, tflop in ((42, 2830), (84, 5660), (105, 7070), (120, 8080)):
        assert 5 * frames / 3 * law(wan_costs, 3, 18) == pytest.approx(tflop, abs=5)
    # and what diffusers adds to it, the prompt's keys and values in every pass, is small
    assert wan_costs.forward(3, 18).total / TERA == pytest.approx(40.4, rel=0.005)


def test_the_steps_of_stage_2_cost_what_is_published(wan_costs: ModelCosts) -> None:
    """At 105 latents: 28 chunks of 4 + 1 passes, 7 that stop after 2.5 on average; scores over 42 latents."""
    chunk, score = law(wan_costs, 3, 18), law(wan_costs, 42)
    rollout = (28 * 5 + 7 * 2.5) * chunk
    critic, generator = rollout + 4 * score, rollout + 3 * score + 6 * 3 * chunk
    assert critic == pytest.approx(10_200, abs=50) and generator == pytest.approx(10_000, abs=50)
    assert 500 * 64 * (critic + generator / 5) * TERA == pytest.approx(3.9e20, rel=0.005)
    hours = 500 * 64 * (critic + generator / 5) / 989 / 3600
    assert hours / 0.4 == pytest.approx(270, abs=10) and hours / 0.3 == pytest.approx(370, abs=10)


def test_our_stage_2_is_that_with_one_rollout_for_both_updates(wan_costs: ModelCosts) -> None:
    p = load.load_params(ROOT / "profiles/wan-1.3b.yaml")
    at_105 = replace(p.stage2, horizon=HorizonSpec(105, 105, 0, "const"))
    ours = need.estimate_student(at_105, wan_costs, p.teacher.view).operations / TERA
    # the scores see 18 frames of the past, since they see what the student's memory holds beside the window's first chunk
    chunk, score = law(wan_costs, 3, 18), law(wan_costs, 39)
    published = (28 * 5 + 7 * 2.5) * chunk + 4 * score + (3 * score + 6 * 3 * chunk) / 5
    # ours also remembers the window's chunks (7 passes), and its memory is not full before chunk 26, which saves more
    assert 0.9 * published < ours < published


def test_training_states_take_what_is_published(wan_costs: ModelCosts) -> None:
    p = load.load_params(ROOT / "profiles/wan-1.3b.yaml")
    exact = replace(wan_costs, compute=Compute("native", "float32", False, compiled=False, graphs=False, merged=False))
    states = need.estimate_base(p.base, exact).states()
    assert (sum(states.values()) - states["average"]) / 1e9 == pytest.approx(22.7, abs=0.05), "16 bytes a parameter"
    # docs/performance.md, "Memory of a GPU": the frozen teacher in bfloat16
    stage2 = need.estimate_student(p.stage2, wan_costs, p.teacher.view)
    assert sum(stage2.states().values()) / 1e9 == pytest.approx(59.6, abs=0.1)
    # There, ZeRO on 8 GPUs takes 14.9 and 7.4 GB, with the average and bfloat16 weights split too. Ours keeps average and teacher
    # whole, weights in float32, and DeepSpeed's master weights beside them: bytes of a parameter of one network, part by part.
    # With ZeRO 2 a rank's own gradients are whole until their one reduction.
    parts = {2: 8 + 4 + 2 + 8 + (16 + 8) / 8 + 4, 3: 4 + 2 + (8 + 8 + 16 + 8) / 8 + 4}
    for zero, each in parts.items():
        assert sum(stage2.states(zero, 8).values()) == pytest.approx(each * wan_costs.parameters)
    assert forecast.estimate_encoding(p).clip_bytes == pytest.approx(21e6, rel=0.01), "105 latents in bfloat16"


# -------------------------------------------------------------------------------------------------- what is averaged


def test_lengths_and_starts_are_those_that_training_draws() -> None:
    horizon, drawn = HorizonSpec(9, 30, 40, "linear"), passes.Tally({})
    rng = torch.Generator().manual_seed(0)
    for step in range(60):
        for _ in range(100):
            drawn.add(horizon.sample_length(step, 3, rng), 1 / 6000)
    expected = passes.tally_lengths(horizon, 3, 60)
    assert sum(expected.values()) == pytest.approx(1)
    assert drawn.shares == pytest.approx(expected, abs=0.02)


def test_the_memory_is_counted_by_its_own_policy() -> None:
    seen = [one for one, _ in zip(passes.trace_memory(spec(), 3), range(40), strict=False)]
    past = [one.denoising for one in seen]
    assert past[:3] == [0, 3, 6] and past == sorted(past)
    assert past[-1] == spec().size - 3
    # By number all videos promote alike; by content the list of candidates holds up to three more than a video does, and a candidate
    # that was compacted lives on while a store may still ask for it.
    by_number = [one for one, _ in zip(passes.trace_memory(spec(promote="uniform"), 3), range(40), strict=False)]
    assert len(by_number[-1].alive) == spec().size
    assert {len(one.alive) for one in seen[28:]} == {spec().size + 1 + spare for spare in range(SPARE)}


@pytest.mark.slow
def test_wans_encoder_costs_what_pytorch_counts() -> None:
    with torch.device("meta"):
        vae = AutoencoderKLWan().eval()
    counted = []
    for frames in (1, 5):
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            vae.encode(torch.zeros(1, 3, frames, 64, 64))
        counted.append(counter.get_total_flops())
    for frames, operations in zip((1, 5), counted, strict=True):
        assert count_codec_operations("wan", 16, frames, 64 * 64) == pytest.approx(operations, rel=0.03)


def test_the_papers_clips_in_shards() -> None:
    one = forecast.estimate_encoding(load.load_params(ROOT / "profiles/wan-1.3b.yaml"))
    assert one.count_shards(25) == 1 and one.count_shards(26) == 2, "25 clips of 20 MiB in 512 MiB"
    assert one.count_shards(40_000) == 1600
    machine = Hardware(ranks=8, memory=80 * 2**30, tflops=346.0, unit="GPU", description="")
    line = one.format_line(40_000, machine)
    assert line.startswith("781 GiB in 1,600 shards of 512 MiB, an index of about 39.1 MiB, ") and line.endswith(" in the codec")
    assert EncodingNeed(100.0, 1 / 2**20, 1.0).count_shards(3) == 3, "a clip that is larger than a shard has one for itself"
