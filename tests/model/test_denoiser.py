import copy
import dataclasses
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cf_model.model import wan
from cf_model.model.attention import MemoryRope
from cf_model.model.denoiser import Compute, Denoiser
from cf_model.model.memory import empty_memory
from cf_model.train.trainer.ema import EMA
from cf_model.train.trainer.engine import Optimizer, OptimizerSpec
from tests.small import SHAPE, denoiser, normal, spec

TEXT = normal(2, 5, 8, seed=3)
EVERYTHING = {"sink": 0, "slow": 0, "fast": 99, "promote": "none", "positions": "absolute"}


def plain(model):
    """The same weights in an untouched diffusers model."""
    reference = type(model.transformer).from_config(model.transformer.config)
    reference.load_state_dict(model.transformer.state_dict(), strict=True)
    return reference.eval()


def test_without_a_memory_it_is_diffusers_wan():
    model = denoiser()
    x, sigma = normal(2, 6, *SHAPE), torch.tensor([0.3, 0.7])
    with torch.no_grad():
        expected = plain(model)(x.transpose(1, 2), 1000 * sigma, TEXT, return_dict=False)[0].transpose(1, 2)
        assert float((model.velocity(x, sigma, TEXT) - expected).abs().max()) < 1e-6
        assert float((model(x, sigma, TEXT) - (x - sigma.view(-1, 1, 1, 1, 1) * expected)).abs().max()) < 1e-6


def test_one_level_a_frame_is_one_level_when_they_agree():
    model, x = denoiser(), normal(2, 6, *SHAPE)
    sigma = torch.tensor([0.3, 0.7])
    with torch.no_grad():
        assert torch.allclose(model.velocity(x, sigma[:, None].expand(2, 6), TEXT), model.velocity(x, sigma, TEXT), atol=1e-6)


def test_state_dict_keys_stay_those_of_diffusers():
    model = denoiser()
    assert set(model.transformer.state_dict()) == set(plain(model).state_dict())


class Masked:
    """diffusers' own attention with a block-causal mask over tokens: what chunk after chunk must equal."""

    def __init__(self, inner, mask):
        self.inner, self.mask = inner, mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return self.inner(attn, hidden_states, encoder_hidden_states, self.mask, rotary_emb)


def test_chunk_after_chunk_is_block_causal_attention():
    model, x, chunk = denoiser(), normal(2, 9, *SHAPE), 3
    reference = plain(model)
    blocks = torch.arange(9 * 4) // (chunk * 4)
    mask = (blocks[:, None] >= blocks[None, :])[None, None]
    for block in reference.blocks:
        block.attn1.set_processor(Masked(block.attn1.processor, mask))
    zero = torch.zeros(2)
    with torch.no_grad():
        expected = reference(x.transpose(1, 2), zero, TEXT, return_dict=False)[0].transpose(1, 2)
        memory = empty_memory(spec(**EVERYTHING))
        for first in range(0, 9, chunk):
            part = x[:, first : first + chunk]
            assert torch.allclose(model.velocity(part, zero, TEXT, memory), expected[:, first : first + chunk], atol=2e-5)
            memory = model.remember(part, TEXT, memory)


def test_moving_every_position_changes_nothing():
    model = denoiser()
    early = model.remember_clip(normal(2, 6, *SHAPE), TEXT, spec(**EVERYTHING), chunk=3)
    late = copy.copy(early)
    object.__setattr__(late, "frame_count", early.frame_count + 40)
    for frame in late.frames:
        object.__setattr__(frame, "index", frame.index + 40)
    x, sigma = normal(2, 3, *SHAPE, seed=5), torch.tensor([0.5, 0.9])
    with torch.no_grad():
        moved = model.velocity(x, sigma, TEXT, late)
        for frame in late.frames:
            object.__setattr__(frame, "index", frame.index - 40)
        assert torch.allclose(moved, model.velocity(x, sigma, TEXT, early), atol=2e-5)


def test_what_was_forgotten_has_no_influence():
    """Neither a frame that has left the memory, nor a candidate in the videos that do not hold it."""
    model, memory, seen = denoiser(), empty_memory(spec(slow=4, tau=0.45)), []
    for part in normal(2, 60, *SHAPE).split(3, dim=1):
        memory = model.remember(part, TEXT, memory)
        seen += [frame for frame in memory.frames if not any(frame is other for other in seen)]
    held = memory.slow.mask_held()[:, 0]  # [B, places]
    assert held.any() and not held.all() and memory.slow.order is not None
    forgotten = [frame for frame in seen if not any(frame is other for other in memory.frames)]
    assert len(forgotten) > 20
    x, sigma = normal(2, 3, *SHAPE, seed=5), torch.tensor([0.5, 0.9])
    with torch.no_grad():
        before = model.velocity(x, sigma, TEXT, memory)
        for frame in forgotten:
            for tensor in (*frame.keys, *frame.values):
                tensor.add_(1.0)
        for video in range(2):
            mine = set(memory.slow.order[video, 0, : int(memory.slow.count[video, 0])].tolist())
            for number, frame in enumerate(memory.slow.candidates):
                for tensor in (*frame.keys, *frame.values):
                    tensor[video].add_(0.0 if number in mine else 1.0)
        model.transformer.rope.forget_store(memory)
        assert torch.equal(model.velocity(x, sigma, TEXT, memory), before)
        memory.slow.candidates[int(memory.slow.order[held[:, 0].int().argmax(), 0, 0])].keys[0].add_(1.0)
        model.transformer.rope.forget_store(memory)
        assert not torch.equal(model.velocity(x, sigma, TEXT, memory), before), "what is remembered does have influence"


def test_layers_that_decide_alike_see_what_one_decision_shows_them():
    model, x = denoiser(), normal(2, 30, *SHAPE)
    one, each = (model.remember_clip(x, TEXT, spec(slow=2, tau=1.0, scope=scope), chunk=3) for scope in ("global", "layer"))
    assert one.frame_indices() == each.frame_indices(layer=1) and (one.groups, each.groups) == (1, 2)
    part, sigma = normal(2, 3, *SHAPE, seed=5), torch.tensor([0.5, 0.9])
    with torch.no_grad():
        assert torch.equal(model.velocity(part, sigma, TEXT, one), model.velocity(part, sigma, TEXT, each))


@pytest.mark.parametrize("positions", ["anchored", "packed", "absolute"])
def test_layers_of_different_occupancy_run_in_one_pass(positions):
    """Each layer's keys are masked and rotated by its own decisions: without the frame that only layer 1 holds, the answer is another."""
    model = denoiser()
    each = model.remember_clip(normal(2, 30, *SHAPE), TEXT, spec(scope="layer", tau=1.0, positions=positions), chunk=3)
    first_only = torch.tensor([0, 1])
    uneven = dataclasses.replace(each, slow=dataclasses.replace(each.slow, count=each.slow.count - first_only))
    assert len(uneven.frame_indices(layer=0)["slow"]) == len(uneven.frame_indices(layer=1)["slow"]) + 1
    part, sigma = normal(2, 3, *SHAPE, seed=5), torch.tensor([0.5, 0.9])
    with torch.no_grad():
        assert not torch.allclose(model.velocity(part, sigma, TEXT, uneven), model.velocity(part, sigma, TEXT, each), atol=1e-4)


def test_only_a_pass_that_remembers_takes_keys_and_values(monkeypatch):
    """A checkpointed pass would keep all of them until its backward pass is over."""
    seen, inner = [], MemoryRope.forward
    monkeypatch.setattr(MemoryRope, "forward", lambda rope, x: seen.append(rope.captured is not None) or inner(rope, x))
    model, x, sigma = denoiser(), normal(2, 3, *SHAPE), torch.tensor([0.5, 0.9])
    memory = model.remember(x, TEXT, empty_memory(spec()))
    model(x, sigma, TEXT, memory)
    model.offer(x, sigma, TEXT, memory)
    assert seen == [True, False, True]


def test_an_attention_that_is_not_installed_is_refused():
    with pytest.raises(ValueError, match="attention is flash2, but the package flash_attn is not installed"):
        Denoiser(plain(denoiser()), Compute("flash2", "bfloat16", checkpointing=False, compiled=False, graphs=False, merged=False))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="attention is cudnn, which needs a GPU, and there is none; use native"):
            Denoiser(plain(denoiser()), Compute("cudnn", "bfloat16", checkpointing=False, compiled=False, graphs=False, merged=False))
    with pytest.raises(ValueError, match="attention is cudnn, which computes in bfloat16, but dtype is float32; use dtype: bfloat16"):
        Compute("cudnn", "float32", checkpointing=False, compiled=False, graphs=False, merged=False)


def test_in_bfloat16_weights_and_gradients_stay_wide_and_keys_are_narrow():
    exact = denoiser()
    low = Denoiser(plain(exact), Compute("native", "bfloat16", checkpointing=True, compiled=False, graphs=False, merged=False))
    x, sigma = normal(2, 3, *SHAPE, seed=5), torch.tensor([0.5, 0.9])
    memories = [model.remember_clip(normal(2, 9, *SHAPE), TEXT, spec(), chunk=3) for model in (exact, low)]
    wide, narrow = (model.velocity(x, sigma, TEXT, memory) for model, memory in zip((exact, low), memories, strict=True))
    assert narrow.dtype == torch.float32 and 1e-5 < float((wide - narrow).detach().abs().mean() / wide.detach().abs().mean()) < 0.02
    assert {k.dtype for frame in memories[1].frames for k in (*frame.keys, *frame.values)} == {torch.bfloat16}
    narrow.square().mean().backward()
    wide.square().mean().backward()
    for a, b in zip(low.parameters(), exact.parameters(), strict=True):
        assert a.dtype == a.grad.dtype == torch.float32 and float((a.grad - b.grad).norm() / b.grad.norm()) < 0.1


LOW = Compute("native", "bfloat16", checkpointing=False, compiled=False, graphs=False, merged=False)


def random_states(model, x, sigma):
    """What passes with and without gradient give, with a memory and without: by copies of the weights, and by autocast alone."""
    made = []
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            memory = model.remember(x, TEXT, empty_memory(spec()), grad=grad)
            keys = [frame.keys[1] for frame in memory.frames]
            made.append([model.velocity(x, sigma, TEXT).detach(), model(x, sigma, TEXT, memory).detach(), *(k.detach() for k in keys)])
    return made


def share_of_error(model, x, sigma):
    """How far passes by copied weights are from float32, over how far those are that autocast rounds, which store what is wide as wide.

    A model that kept old copies after a step would be as far off as the step is large, which is ten times as far and more.
    """
    copied, cast = random_states(model, x, sigma)
    exact, _ = random_states(Denoiser(plain(model)), x, sigma)
    errors = [torch.cat([(a - b).flatten() for a, b in zip(made, exact, strict=True)]).norm() for made in (copied, cast)]
    assert errors[0] > 0
    return copied[0], float(errors[0] / errors[1])


def test_copied_weights_are_as_exact_as_autocast_until_the_weights_change():
    model, x, sigma = Denoiser(plain(denoiser()), LOW), normal(2, 3, *SHAPE, seed=5), torch.tensor([0.5, 0.9])
    optimizer = Optimizer(model, OptimizerSpec(0.1, 0.0, 0.9, 0.99, 0.0, 0.0, 1.0, 0, 0.0), 4)
    average, before = EMA(model, 0.5), None
    for _ in range(2):
        for one in (model, average.model):
            copied, share = share_of_error(one, x, sigma)
            assert share < 1.1 and one.copies.copies
        assert before is None or not torch.equal(before, copied), "an update shows in passes without gradient"
        before = copied
        optimizer.backward(model.velocity(x, sigma, TEXT).square().mean())
        optimizer.step()
        average.update()
        assert not model.copies.copies and not average.model.copies.copies
    random_states(model, x, sigma)
    model.load_state_dict(denoiser(3).state_dict())
    assert share_of_error(model, x, sigma)[1] < 1.1


def test_weights_are_cast_once_an_update_and_not_in_every_pass():
    """By torch's own count of casts to bfloat16: of weights, whose sizes are those of the model's parameters."""
    model, x, sigma = Denoiser(plain(denoiser()), LOW), normal(2, 3, *SHAPE, seed=5), torch.tensor([0.5, 0.9])
    sizes = {id(weight): name for name, weight in model.named_parameters()}

    class Casts(TorchDispatchMode):
        seen: ClassVar[list[str]] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
                storage = args[0].untyped_storage().data_ptr()
                self.seen += [name for name, weight in model.named_parameters() if weight.untyped_storage().data_ptr() == storage]
            return function(*args, **kwargs or {})

    with torch.no_grad(), Casts():
        for _ in range(3):
            model.velocity(x, sigma, TEXT)
    assert len(sizes) > len(Casts.seen) == len(set(Casts.seen)) > 20


def test_a_frozen_model_is_narrow_and_gives_the_same():
    model, x, sigma = Denoiser(plain(denoiser()), LOW), normal(2, 3, *SHAPE, seed=5), torch.tensor([0.5, 0.9])
    with torch.no_grad():
        before = model.velocity(x, sigma, TEXT)
        model.freeze()
        assert torch.equal(model.velocity(x, sigma, TEXT), before) and not model.copies.copies
    dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
    assert dtypes["transformer.blocks.1.ffn.net.0.proj.weight"] == torch.bfloat16
    wide = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert all("norm" in name or "scale_shift" in name or "time_" in name for name in wide)
    assert {weight.dtype for weight in denoiser().freeze().parameters()} == {torch.float32}


def test_the_time_embedding_is_float32_in_bfloat16_too():
    """To the bit that of a model in float32, at levels that bfloat16 cannot tell apart: 1000 σ of 997 and 998."""
    exact, low = denoiser(), Denoiser(plain(denoiser()), LOW)
    seen = {}
    for name, model in (("exact", exact), ("low", low)):
        model.transformer.condition_embedder.register_forward_hook(lambda _, __, out, name=name: seen.setdefault(name, out))
        model.velocity(normal(2, 3, *SHAPE), torch.tensor([0.997, 0.998]), TEXT)
    for ours, theirs in zip(seen["low"][:2], seen["exact"][:2], strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs) and not torch.equal(ours[0], ours[1])


def test_keys_leave_a_checkpointed_block_as_its_results():
    """The backward pass, which runs the blocks again, hands out nothing more; gradients are those without checkpoints."""
    x, sigma, gradients = normal(2, 3, *SHAPE, seed=5), torch.tensor([0.5, 0.9]), []
    for checkpointing in (False, True):
        model = Denoiser(plain(denoiser()), Compute("native", "float32", checkpointing, compiled=False, graphs=False, merged=False))
        captured: Any = {}
        out = model._run_transformer(x, sigma, TEXT, None, captured)
        first = {layer: pair for layer, pair in captured.items()}
        (out.square().mean() + sum((k * v).mean() for k, v in captured.values())).backward()
        assert sorted(captured) == [0, 1]
        assert all(captured[layer][n] is pair[n] for layer, pair in first.items() for n in (0, 1))
        gradients.append([weight.grad for weight in model.parameters()])
    for plainly, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plainly, rtol=0, atol=1e-6)


def test_saved_and_loaded_is_the_same(tmp_path):
    model = denoiser()
    wan.save_transformer(model, tmp_path)
    again = wan.load_transformer(tmp_path).eval()
    x, sigma = normal(2, 6, *SHAPE), torch.tensor([0.3, 0.7])
    with torch.no_grad():
        assert torch.equal(model(x, sigma, TEXT), again(x, sigma, TEXT))
    assert (tmp_path / "config.json").is_file() and model.transformer.rope.memory is None


def test_a_missing_weight_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    wan.save_transformer(denoiser(), tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights.pop("proj_out.weight")
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"it lacks proj_out\.weight; it must hold exactly the weights"):
        wan.load_transformer(tmp_path)


def test_absolute_positions_end_with_the_table():
    model = denoiser()
    memory = empty_memory(spec(**EVERYTHING))
    object.__setattr__(memory, "frame_count", 254)
    with pytest.raises(ValueError, match="RoPE table of 256 positions"):
        model.velocity(normal(2, 3, *SHAPE), torch.tensor([0.5, 0.9]), TEXT, memory)
