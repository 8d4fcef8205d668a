"""Merged passes, captured passes, chosen kernels and 8 bits: each gives what the plain way gives, or says why it can't."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from itertools import islice
from types import ModuleType, SimpleNamespace

import pytest
import torch
from diffusers.models.activations import GELU

from cf_model.model import block, graphs, kernels
from cf_model.model import denoiser as denoiser_file
from cf_model.model.denoiser import Compute, Denoiser
from cf_model.model.kernels import AttentionShape, choose_kernel
from cf_model.model.memory import MemorySpec, empty_memory
from cf_model.model.precision import check_fp8, check_onednn
from cf_model.model.rollout import stream
from cf_model.model.rope import apply_rope
from tests.capture import FakeRecorder
from tests.model.test_batch_memory import READINGS
from tests.model.test_store import PLAIN, SIGMAS, TAU
from tests.small import SHAPE, denoiser, normal, rng, spec

SEEN = [{}, PLAIN, {"tau": TAU}, {"tau": TAU, "scope": "layer"}, {"tau": TAU, "positions": "absolute"}, {"tau": TAU, "fast": 9}]


def generate(model: Denoiser, plan: MemorySpec, chunks: int = 14, *, merged: bool = False) -> torch.Tensor:
    """Make a video of so many chunks, two at once."""
    given = {"sigmas": SIGMAS, "chunk": 3, "memory": empty_memory(plan), "rng": rng(), "merged": merged}
    return torch.cat(list(islice(stream(model, normal(2, 5, 8, seed=3), SHAPE, **given), chunks)), dim=1)


@pytest.mark.parametrize("changes", [*SEEN, *({"tau": TAU} | reading for reading in READINGS.values())])
def test_the_plain_block_computes_the_same_bits(changes, monkeypatch):
    model, plan, passes = denoiser(positions=1024, head_dim=32), spec(**changes), []
    run = block.run_plain_block
    monkeypatch.setattr(block, "run_plain_block", lambda *given, **more: passes.append(given[0]) or run(*given, **more))
    plain = generate(model, plan)
    assert len(passes) >= 14 * 3 * 2, "every pass of every chunk in both layers"
    monkeypatch.setattr(block, "can_run_plain", lambda *_: False)
    assert torch.equal(generate(model, plan), plain)


def test_the_plain_block_calls_what_listens_to_a_layer():
    model, heard = denoiser(head_dim=32), list[str]()
    names = [name for name, layer in model.transformer.blocks[0].named_modules() if type(layer) is torch.nn.Linear]
    names.remove("ffn.net.0.proj")  # computed with its activation, in every way
    for name in names:
        model.transformer.blocks[0].get_submodule(name).register_forward_hook(lambda *_, name=name: heard.append(name))
    generate(model, spec(), 1)
    assert set(heard) == set(names)


@pytest.mark.parametrize("changes", [*SEEN, *({"tau": TAU} | reading for reading in READINGS.values())])
def test_merged_passes_make_the_same_video(changes, monkeypatch):
    model, plan, merges = denoiser(positions=1024), spec(**changes), []
    rope, merge = model.transformer.rope, model.transformer.rope._merge_passes
    monkeypatch.setattr(rope, "_merge_passes", lambda memory, x: merges.append(memory) or merge(memory, x))
    plain = generate(model, plan)
    assert not merges
    assert float((generate(model, plan, merged=True) - plain).abs().max()) < 1e-6 * max(1.0, float(plain.abs().max()))
    if plan.when == "evict" and plan.fast >= 6 and plan.commit == "all":
        assert len(merges) > 5, "once the memory is full, every chunk but the first is remembered by the next one's first pass"


@pytest.mark.parametrize("head_dim", [12, 32])
@pytest.mark.parametrize("changes", [each | ({} if each is PLAIN else {"slow": 3}) for each in SEEN])
def test_captured_passes_make_the_same_video(changes, head_dim, monkeypatch):
    """What would be captured on a GPU neither waits for the host nor keeps what it allocates, and finds everything where it was."""
    model, plan, recorder = denoiser(positions=1024, head_dim=head_dim), spec(**changes), FakeRecorder()
    plain = generate(model, plan, 20)
    monkeypatch.setattr(graphs, "record_graph", recorder)
    model.compute = replace(model.compute, graphs=True)
    assert torch.equal(generate(model, plan, 20), plain)
    assert recorder.captures and recorder.replays > 8, "once the memory is full, all passes are replayed but a chunk's first"


def test_a_graph_is_forgotten_when_prompt_or_weights_change(monkeypatch):
    model, recorder = denoiser(), FakeRecorder()
    monkeypatch.setattr(graphs, "record_graph", recorder)
    model.compute = replace(model.compute, graphs=True)
    x, sigma, texts = normal(1, 3, *SHAPE), torch.ones(1), [normal(1, 5, 8, seed=seed) for seed in (3, 4)]
    with torch.no_grad():
        memory = model.remember(x, texts[0], empty_memory(spec()))
        for text in texts:
            model.compute = replace(model.compute, graphs=False)
            plain = model(x, sigma, text, memory)
            model.compute = replace(model.compute, graphs=True)
            assert all(torch.equal(model(x, sigma, text, memory), plain) for _ in range(3))
        model.load_state_dict(denoiser(seed=1).state_dict())
        other = [model(x, sigma, texts[1], memory) for _ in range(3)]
    assert recorder.captures == 3 and not torch.allclose(other[0], plain) and torch.equal(other[0], other[2])


def test_what_a_replay_gives_outlives_the_next_replay(monkeypatch):
    """A replay writes over the tensors of the one before, while a memory still holds those keys and a sampler that velocity."""
    monkeypatch.setattr(graphs, "record_graph", recorder := FakeRecorder())
    passes, inputs = graphs.PassGraphs(), [torch.full((2,), float(number)) for number in range(5)]
    answers = [passes.run("kind", (), (x,), lambda x: (2 * x, {0: (x + 1, x - 1)})) for x in inputs]
    for x, (velocity, captured) in zip(inputs, answers, strict=True):
        assert torch.equal(velocity, 2 * x) and torch.equal(captured[0][0], x + 1) and torch.equal(captured[0][1], x - 1)
    assert recorder.captures == 1 and recorder.replays == 4


def test_graphs_without_a_gpu_are_refused():
    with pytest.raises(ValueError, match="graphs is true, which needs a GPU, and there is none; use graphs: false"):
        Denoiser(denoiser().transformer, Compute("native", "float32", checkpointing=False, compiled=False, graphs=True, merged=False))


CUDA = AttentionShape(1, 4680, 32760, 12, 128, torch.bfloat16, torch.device("cuda"))


def test_the_fastest_kernel_that_runs_is_taken(monkeypatch, caplog):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda package: package == "flash_attn_interface" or None)
    times = {"native": 3.0, "cudnn": 2.0, "flash3": 1.0}
    with caplog.at_level("INFO"):
        assert choose_kernel(CUDA, lambda name, shape: times[name]) == "flash3"
    assert (
        "attention auto: flash3 for 4680 queries and 32760 keys of 1 videos (native 3e+03 ms, cudnn 2e+03 ms, flash3 1e+03 ms)"
        in caplog.text
    )
    assert choose_kernel(replace(CUDA, videos=2), lambda name, shape: times[name]) == "cudnn", "flash takes no mask"

    def fail(name, shape):
        if name == "flash3":
            raise RuntimeError("FlashAttention-3 only supports Hopper")
        return times[name]

    assert choose_kernel(CUDA, fail) == "cudnn"


def test_on_a_cpu_nothing_is_measured():
    for shape in (replace(CUDA, device=torch.device("cpu")), replace(CUDA, dtype=torch.float32)):
        assert choose_kernel(shape, lambda name, shape: pytest.fail("nothing is to be chosen")) == "native"
    shape = AttentionShape(1, 8, 16, 2, 8, torch.float32, torch.device("cpu"))
    assert 0 < kernels.measure_kernel("native", shape) < 1


def test_auto_attention_changes_the_kernel_of_all_blocks_once(monkeypatch):
    model, asked = denoiser(), []
    model.compute = replace(model.compute, attention="auto")
    monkeypatch.setattr(denoiser_file, "choose_kernel", lambda shape: asked.append(shape) or "native")
    plain = generate(denoiser(), spec(tau=TAU), 4)
    assert torch.equal(generate(model, spec(tau=TAU), 4), plain)
    assert [(shape.videos, shape.queries, shape.keys) for shape in asked] == [(2, 12, 12), (2, 12, 84)]
    monkeypatch.setattr(denoiser_file, "choose_kernel", lambda shape: "flash2")
    model._kernels = {}
    model._choose_attention(normal(1, 3, *SHAPE), None)
    backends = {block.attn1.processor.backend for block in model.transformer.blocks}
    assert backends == {"flash"} and model.kernel == "flash2" and not model.transformer.rope.takes_mask


@torch.no_grad()
def test_a_product_with_its_activation_in_bfloat16_is_as_exact_as_both_apart(monkeypatch):
    """On this machine's CPU, by the operation of a GPU, whose answer here has the exact GELU, and while a compiler looks."""
    layer = denoiser().transformer.blocks[0].ffn.net[0].bfloat16()
    x, exact = normal(2, 12, layer.proj.in_features).bfloat16(), copy.deepcopy(layer).float()
    wanted = exact(x.float())
    apart = GELU.forward(layer, x)
    error = float((apart - wanted).norm())
    assert 0 < float((layer(x) - wanted).norm()) < 1.05 * error
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert torch.equal(layer(x), apart)
    monkeypatch.setattr(block, "is_on_gpu", lambda x: True)
    exact.approximate = "none"
    as_on_gpu, exactly = layer(x), GELU.forward(exact, x.float())
    assert as_on_gpu.shape == apart.shape and float((as_on_gpu - exactly).norm()) < 1.05 * error
    layer.is_fused = False
    assert torch.equal(layer(x), apart), "a product in 8 bits is left alone"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the operation of a GPU, whose GELU is the approximate one")
@torch.no_grad()
def test_a_gpu_has_the_approximate_activation_in_its_product():
    layer = denoiser().transformer.blocks[0].ffn.net[0].cuda().bfloat16()
    x = normal(2, 12, layer.proj.in_features).cuda().bfloat16()
    torch.testing.assert_close(layer(x), GELU.forward(layer, x), rtol=0.02, atol=0.002)


@torch.no_grad()
def test_a_compiled_rotation_is_the_plain_one(monkeypatch):
    x, rotation = normal(2, 6, 3, 32), torch.polar(torch.ones(1, 6, 1, 16), normal(1, 6, 1, 16, seed=2))
    plain = apply_rope(x, rotation)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(apply_rope(x, torch.view_as_real(rotation)), plain, rtol=0, atol=1e-6)


def test_8_bits_need_torchao_bfloat16_and_a_gpu(monkeypatch):
    with pytest.raises(ValueError, match=r"fp8 needs the package torchao, which is not installed"):
        check_fp8("bfloat16")
    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace(__spec__=object()))
    with pytest.raises(ValueError, match=r"fp8 is wanted with dtype float32, .*; use dtype: bfloat16"):
        check_fp8("float32")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"fp8 needs a GPU of compute capability 8.9 or more"):
            check_fp8("bfloat16")


def test_8_bits_are_for_the_products_of_the_blocks(monkeypatch):
    library, model, narrowed = ModuleType("torchao.quantization"), denoiser(), []
    library.PerRow = library.Float8DynamicActivationFloat8WeightConfig = lambda **settings: None
    library.quantize_ = lambda module, config: narrowed.append(module)
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", library)
    assert model.narrow_to_fp8() is model and narrowed == list(model.transformer.blocks)
    assert not any(weight.requires_grad for weight in model.parameters())


def test_products_by_onednn_make_the_same_video(monkeypatch):
    model, plan, multiply, kinds = denoiser(positions=1024), spec(tau=TAU), torch.ops.mkldnn._linear_pointwise, []
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *given: kinds.append(given[3]) or multiply(*given))
    plain = generate(model, plan)
    assert model.multiply_by_onednn() is model and not any(weight.requires_grad for weight in model.parameters())
    assert "none" not in kinds
    kinds.clear()
    fast = generate(model, plan)
    assert kinds.count("none") >= 7 * kinds.count("gelu") > 0, "six products of two attentions, and the feed-forward's second"
    assert float((fast - plain).abs().max()) < 1e-6 * max(1.0, float(plain.abs().max()))
    used = {type(layer) for each in model.transformer.blocks for layer in (each.attn1.to_q, each.attn2.to_out[0], each.ffn.net[2])}
    assert used == {block.OneDnnLinear} and type(model.transformer.proj_out) is torch.nn.Linear


def test_products_by_onednn_are_for_passes_without_gradient(monkeypatch):
    layer, x = torch.nn.Linear(8, 8), normal(2, 3, 8)
    with_gradient = layer(x)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *given: pytest.fail("a backward pass wants torch's own product"))
    layer.__class__ = block.OneDnnLinear
    assert torch.equal(layer(x), with_gradient)


def test_products_by_onednn_are_refused_where_they_change_nothing(monkeypatch):
    with pytest.raises(ValueError, match=r"onednn is wanted with dtype bfloat16, .*; use dtype: float32, or leave onednn out"):
        check_onednn("bfloat16")
    check_onednn("float32")
    monkeypatch.setattr(block, "FUSES", False)
    with pytest.raises(ValueError, match=r"this build of torch has no oneDNN; leave onednn out"):
        denoiser().multiply_by_onednn()
