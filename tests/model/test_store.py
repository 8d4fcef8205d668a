"""The store of passes without gradient shows what the memory's frames are, at the same cost in every chunk."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cf_model.model import store
from cf_model.model.denoiser import Denoiser
from cf_model.model.memory import Memory, MemorySpec, empty_memory
from cf_model.model.rollout import descend_levels, stream
from tests.model.test_batch_memory import READINGS
from tests.preloaded import python_folder
from tests.small import SHAPE, denoiser, normal, rng, spec
from tests.test_presets import NAMES, parameters

ROOT = Path(__file__).parents[2]
SIGMAS = [1.0, 0.6]
PLAIN = {"sink": 0, "slow": 0, "fast": 9, "promote": "none", "positions": "absolute"}
TAU = 0.83  # near the median similarity of this random model, so that videos differ


def generate(model: Denoiser, plan: MemorySpec, chunks: int, batch: int = 1) -> Iterator[tuple[torch.Tensor, Memory]]:
    """Make chunks as `stream` does; yields what the last pass over each chunk was given."""
    memory, noise, text = empty_memory(plan), rng(), normal(batch, 5, 8, seed=3)
    for _ in range(chunks):
        with torch.no_grad():
            x = torch.randn(batch, 3, *SHAPE, generator=noise)
            x_0, (x_t, seen), memory = descend_levels(model, text, x, SIGMAS, memory, noise)
            yield x_t, seen
            memory = model.remember(x_0, text, memory)


def compare_stores(plan: MemorySpec, head_dim: int) -> None:
    """Every chunk's last pass: by the store, by a store made anew, and by the memory's frames, as the loss replays it."""
    model, text, sigma = denoiser(positions=1024, head_dim=head_dim), normal(2, 5, 8, seed=3), torch.full((2,), SIGMAS[-1])
    past, stores = list[tuple[torch.Tensor, Memory, torch.Tensor]](), model.transformer.rope._stores
    for x_t, memory in generate(model, plan, 12, batch=2):
        by_store = model.velocity(x_t, sigma, text, memory)
        followed = stores.pop(memory, None)
        assert torch.equal(model.velocity(x_t, sigma, text, memory), by_store), "what a store holds does not depend on its past"
        if followed:
            stores[memory] = followed
        past.append((x_t, memory, by_store))
    for x_t, memory, by_store in past:  # when the store has long gone on
        replayed = model.velocity(x_t, sigma, text, memory).detach()
        assert float((replayed - by_store).abs().max()) < 5e-6 * max(1.0, float(by_store.abs().max()))


@pytest.mark.parametrize("head_dim", [12, 32])
@pytest.mark.parametrize("reading", READINGS)
def test_a_replay_sees_what_the_store_showed(reading, head_dim):
    compare_stores(spec(**{"tau": TAU} | READINGS[reading]), head_dim)


@pytest.mark.parametrize("name", NAMES)
def test_a_replay_sees_what_the_store_showed_for_every_preset(name, monkeypatch):
    params = parameters(name)
    system = params.generate.systems[name]
    compare_stores(system.memory or getattr(params, system.weights).memory, 32)


@pytest.mark.parametrize(
    ("changes", "moving"), [(PLAIN, 0), ({"slow": 0, "promote": "none"}, 3), ({"tau": -1.0}, 3)], ids=["window", "bounded", "slow memory"]
)
def test_a_key_is_rotated_again_only_when_its_position_has_changed(changes, moving, monkeypatch):
    """Once a chunk: with bounded positions those of the fast part, which move up by a chunk."""
    rotated, inner = list[int](), store.turn_keys
    monkeypatch.setattr(store, "turn_keys", lambda x, rotation: rotated.append(x.shape[1]) or inner(x, rotation))
    model, tokens = denoiser(), 4
    for number, _ in enumerate(generate(model, spec(**changes), 12)):
        if number > 8 and not (spec(**changes).slow and number % 2 == 0):
            assert rotated == [moving * tokens] * 2 * bool(moving), "in each layer, beside a pass's own"
        rotated.clear()


@pytest.mark.parametrize("changes", [PLAIN, {"tau": TAU}, {"tau": TAU, "scope": "layer"}, {"tau": TAU, "fast": 7}])
def test_the_keys_stay_where_they_are(changes):
    model, seen = denoiser(), Counter[tuple[int, ...]]()
    for number, (_, memory) in enumerate(generate(model, spec(**changes), 14)):
        if number > 2:
            held = model.transformer.rope._stores[memory]
            seen[tuple(tensor.data_ptr() for tensor in (*held.keys, *held.values))] += 1
    assert list(seen.values()) == [11]


COMPARE = """
import dataclasses, functools, torch
from cf_model.model import block
from cf_model.model.denoiser import Denoiser
from tests.model.test_denoiser import plain
from tests.model.test_store import TAU, generate
from tests.small import denoiser, spec
block.torch.compile = functools.partial(torch.compile, backend="aot_eager")
eager, plan = denoiser(), spec(tau=TAU)
compiled = Denoiser(plain(eager), dataclasses.replace(eager.compute, compiled=True)).eval()
for (x_t, memory), (again, other) in zip(generate(eager, plan, 5), generate(compiled, plan, 5), strict=True):
    assert torch.allclose(x_t, again, atol=1e-5) and memory.frame_indices() == other.frame_indices()
assert block.compile_part.cache_info().currsize == 2
print("alike")
"""


def test_compiled_parts_are_one_graph_and_compute_the_same():
    """In a process of its own, because a compiler can't read functions whose arguments are checked, as in tests they are."""
    done = subprocess.run([python_folder() / "python", "-c", COMPARE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "alike\n", done.stderr[-2000:]


def count_calls(model: Denoiser, *names: str) -> Counter[str]:
    """Count the calls of these layers of the transformer from now on."""
    calls: Counter[str] = Counter()
    for name in names:
        model.transformer.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    return calls


def test_the_keys_of_a_prompt_are_computed_once():
    model, text = denoiser(), normal(1, 5, 8, seed=3)
    names = ("condition_embedder.text_embedder.linear_1", "blocks.0.attn2.to_k", "blocks.1.attn2.to_v")
    calls = count_calls(model, *names)
    made = stream(model, text, SHAPE, sigmas=SIGMAS, chunk=3, memory=empty_memory(spec()), rng=rng())
    for _ in range(4):
        next(made)
    assert calls == dict.fromkeys(names, 1)
    x, sigma = normal(1, 3, *SHAPE), torch.ones(1)
    model(x, sigma, text)
    assert calls == dict.fromkeys(names, 2), "a pass with gradient computes its own"
    with torch.no_grad():
        other = model(x, sigma, normal(1, 5, 8, seed=4))
        before = model(x, sigma, text)
        assert calls == dict.fromkeys(names, 3) and not torch.allclose(before, other)
        for change in (lambda: text.mul_(2.0), lambda: model.load_state_dict(denoiser(seed=1).state_dict())):
            change()
            after = model(x, sigma, text)
            assert not torch.allclose(after, before, atol=1e-4), "neither after the prompt nor after the weights have changed"
            before = after


def test_a_pass_that_only_remembers_ends_with_the_last_layers_keys():
    model, x, text = denoiser(), normal(1, 3, *SHAPE), normal(1, 5, 8)
    calls = count_calls(model, "blocks.0.ffn", "blocks.1.attn1.to_v", "blocks.1.attn1.to_q", "blocks.1.attn2", "blocks.1.ffn")
    memory = model.remember(x, text, empty_memory(spec()))
    assert calls == {"blocks.0.ffn": 1, "blocks.1.attn1.to_v": 1}
    model.offer(x, torch.ones(1), text, memory)
    assert calls["blocks.1.ffn"] == 1, "a pass whose velocity is wanted does not"
