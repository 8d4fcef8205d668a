"""One optimiser step of every training stage of wan-1.3b at its real sizes, on torch's meta device, which computes shapes and no numbers.

A host read there has no answer, so this test gives one, and counts: on a GPU each read waits until all work before it is done.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cf_model.model import flow, wan
from cf_model.model.denoiser import Denoiser
from cf_model.model.precision import TimeLinear
from cf_model.model.rollout import HorizonSpec
from cf_model.train.base import BaseTrainer
from cf_model.train.causal_init import CausalInitTrainer
from cf_model.train.student import DistillationTrainer
from cf_model.train.teacher import TeacherTrainer
from cf_model.train.trainer.engine import PLAIN
from cf_model.train.trainer.observe import read_values
from cf_model.train.trajectories import OdeTrajectories
from tasks.params.load import load_params
from tasks.params.schema import Params

ROOT = Path(__file__).parents[2]
SHAPE = (16, 60, 104)  # C, H, W of a latent frame
LAYERS = 1
GROUPED = ("base", "teacher")  # stages whose step is cheap enough to be taken in two groups


@pytest.fixture(scope="module")
def params() -> Params:
    p = load_params(ROOT / "profiles/wan-1.3b.yaml")
    return p.model_copy(update={"model": replace(p.model, layers=LAYERS)})


class Clips:
    """Clips of the real sizes on the CPU, where the data loader leaves them, of zeros that take no memory."""

    shape, empty_text = SHAPE, torch.zeros(512, 4096)

    def rows(self, split: str, at_least: int = 1) -> list[int]:
        return [0, 1]

    def frames(self, row: int) -> int:
        return 105

    def window(self, rows: list[int], starts: list[int], length: int) -> Tensor:
        return torch.zeros(()).expand(len(rows), length, *SHAPE)

    def text(self, rows: list[int]) -> Tensor:
        return self.empty_text.expand(len(rows), -1, -1)


class Trajectories(OdeTrajectories):
    """Stored trajectories of the real sizes, which were never computed."""

    def __init__(self, p: Params) -> None:
        self.spec = replace(p.causal_init.ode, videos=4)
        path = self.spec.levels(p.flow)
        self.sigmas = [path[step] for step in (*self.spec.keep, self.spec.steps)]
        self.frames = p.causal_init.frames

    def read(self, videos: list[int]) -> Tensor:
        return torch.zeros(()).expand(len(videos), len(self.sigmas), self.frames, *SHAPE)

    def text(self, videos: list[int]) -> Tensor:
        return torch.zeros(()).expand(len(videos), 512, 4096)


class Device(TorchDispatchMode):
    """Watches the meta device in the place of a GPU: counts host reads, which it answers with 1, and moves between the devices."""

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.to_host, self.from_host = 0, list[tuple[int, ...]](), list[tuple[int, ...]]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function.overloadpacket
        on_device = any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs)))
        if name is torch.ops.aten._local_scalar_dense and on_device:
            self.reads += 1
            return 1
        assert not on_device or name not in (torch.ops.aten.nonzero, torch.ops.aten.equal), f"{function} reads values"
        target = torch.device(kwargs["device"]).type if name is torch.ops.aten._to_copy and kwargs.get("device") else None
        if target == "cpu" and on_device:
            self.to_host.append(tuple(args[0].shape))
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if target == "meta" and not on_device:
            self.from_host.append(tuple(args[0].shape))
        return function(*args, **kwargs)


class Autocast:
    """torch.autocast for the meta device, which has none: on wherever the model does not turn it off, so in backward passes too."""

    on = True

    def __init__(self, device: str, dtype: torch.dtype | None = None, enabled: bool = True) -> None:
        self.enabled = enabled

    def __enter__(self) -> None:
        self.before, Autocast.on = Autocast.on, self.enabled

    def __exit__(self, *_: object) -> None:
        Autocast.on = self.before


def multiply(layer: torch.nn.Linear, x: Tensor) -> Tensor:
    """nn.Linear.forward: the time embedding's layers in float32, all others in bfloat16."""
    assert isinstance(layer, TimeLinear) is not Autocast.on
    if Autocast.on:
        return F.linear(x.bfloat16(), layer.weight.bfloat16(), None if layer.bias is None else layer.bias.bfloat16())
    assert x.dtype == layer.weight.dtype == torch.float32
    return F.linear(x, layer.weight, layer.bias)


class Ranks:
    """The first of two ranks: what it would send is counted, by torch.distributed's function."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: dict[str, list[int]] = {"all_reduce": [], "all_gather": []}
        for name, answer in {"is_initialized": True, "get_world_size": 2, "get_rank": 0, "get_backend": "gloo"}.items():
            monkeypatch.setattr(torch.distributed, name, lambda answer=answer: answer)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, **_: self.send("all_reduce", tensor))
        monkeypatch.setattr(torch.distributed, "all_gather", lambda parts, tensor: self.send("all_gather", tensor))

    def send(self, name: str, tensor: Tensor) -> Any:
        self.sent[name].append(tensor.numel())
        return SimpleNamespace(wait=lambda: None)


def build_model(p: Params) -> Denoiser:
    with torch.device("meta"):
        return wan.build_transformer(p.model, channels=SHAPE[0], text_channels=4096, seed=0, compute=p.compute)


def build_trainer(stage: str, p: Params) -> Any:
    batch = 4 if stage in GROUPED else 2
    common: dict[str, Any] = {"latents": Clips(), "flow": p.flow, "seed": 0, "engine": replace(PLAIN, micro_batch=1)}
    if stage == "base":
        spec = replace(p.base, batch=batch)
        return BaseTrainer(spec, model=build_model(p), **common)
    if stage == "teacher":
        errors = replace(p.teacher.errors, per_grid=1, grids=2, warmup=0, clean=0.0)
        return TeacherTrainer(replace(p.teacher, batch=batch, errors=errors, no_context=0.0), model=build_model(p), **common)
    if stage.startswith("causal_init"):
        method = "ode" if stage.endswith("ode") else "teacher_forcing"
        spec = replace(p.causal_init, batch=batch, method=method, begin=0.0, longest=6)  # type: ignore[arg-type]
        return CausalInitTrainer(spec, model=build_model(p), trajectories=Trajectories(p) if method == "ode" else None, **common)  # type: ignore[arg-type]
    own = p.stage1 if stage == "stage1" else p.stage2
    frames = own.rollout.window * (2 if stage == "stage2" else 1)
    del common["latents"]
    return DistillationTrainer(
        replace(own, batch=batch, critic_updates=1, steps=2, ema_start=0, horizon=HorizonSpec(frames, frames, 0, "const")),
        student=build_model(p),
        teacher=build_model(p),
        critic=build_model(p),
        view=replace(p.teacher.view, context=own.teacher.context),
        prompts=torch.zeros(()).expand(4, 512, 4096),
        null=torch.zeros(512, 4096),
        shape=SHAPE,
        reencode=lambda latents: latents[:, -1:],
        **common,
    )


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """The meta device has no random numbers: a video's stream is the CPU's, and what is drawn from it is as large as it must be."""
    on_cpu = torch.Generator

    class AnyDevice(type):
        """Makes the CPU's generators for every device; they pass as its instances, because type hints are read while it stands in."""

        def __call__(cls, device: Any = "cpu") -> torch.Generator:
            return on_cpu()

        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, on_cpu)

    monkeypatch.setattr(torch, "Generator", AnyDevice("Generator", (), {}))
    monkeypatch.setattr(flow.BatchGenerator, "draw_rows", lambda rng, make, shape: torch.empty(shape, device="meta"))
    monkeypatch.setattr(torch, "autocast", Autocast)
    monkeypatch.setattr(torch.nn.Linear, "forward", multiply)
    attend, convolve = F.scaled_dot_product_attention, torch.nn.Conv3d._conv_forward

    def attend_narrowly(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
        return attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend_narrowly)
    monkeypatch.setattr(
        torch.nn.Conv3d, "_conv_forward", lambda layer, x, weight, bias: convolve(layer, x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    )
    return Device()


TEXT, NULL = (1, 512, 4096), (512, 4096)
# networks that a step updates
STAGES = {"base": 1, "teacher": 1, "causal_init": 1, "causal_init_ode": 1, "stage1": 2, "stage2": 2}
LOGGED = {
    "base": {"loss", "gradient"},
    "teacher": {"loss", "gradient", "context_frames", "bank_rms"},
    "causal_init": {"loss", "gradient", "similarity"},
    "causal_init_ode": {"loss", "gradient", "similarity"},
    "stage1": {"critic_loss", "student_loss", "student_gradient", "critic_gradient", "ema_distance", "exit"},
    "stage2": {"critic_loss", "student_loss", "student_gradient", "critic_gradient", "ema_distance", "similarity", "slow_frames"},
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_at_real_sizes(stage: str, params: Params, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample at a time, one or two of them, on the first of two ranks."""
    ranks = Ranks(monkeypatch)
    trainer = build_trainer(stage, params)
    networks = [trainer.student, trainer.critic] if stage.startswith("stage") else [trainer.model]
    before = [{name: (weight.shape, weight.dtype) for name, weight in network.named_parameters()} for network in networks]
    with device:
        values = trainer.step(0)
        inside = device.reads, list(device.to_host)
        read = read_values(values)
    # What is read: whether a gradient is finite, once an update, and all values together when the step is over. The bank is the host's.
    residuals = [(21, *SHAPE)] * 2 * 4 if stage == "teacher" else []
    assert inside == (STAGES[stage], residuals) and LOGGED[stage] <= read.keys()
    assert len(device.to_host) == len(residuals) + 1 and len(device.to_host[-1]) == 1
    # What comes from the host: latents and prompts, once a group, and small tables.
    large = {shape for shape in device.from_host if torch.Size(shape).numel() > 1000}
    frames = {shape[-4] for shape in large if shape[-3:] == SHAPE}
    assert all(shape[-3:] == SHAPE or shape in (TEXT, NULL) for shape in large) and bool(frames) is not stage.startswith("stage")
    # What is sent: each gradient once for each update, however many groups and chunks; the bank's residuals; one comparison of chunks.
    weights = [weight.numel() for network in networks for weight in network.parameters() if weight.requires_grad]
    reduced = ranks.sent["all_reduce"]
    assert sorted(reduced) == sorted(weights + ([4 * torch.Size((21, *SHAPE)).numel()] if stage == "teacher" else []))
    assert len(ranks.sent["all_gather"]) == ("similarity" in read)
    # What is left: float32 weights as they were, no gradients, and a teacher in the width of its products.
    after = [{name: (weight.shape, weight.dtype) for name, weight in network.named_parameters()} for network in networks]
    assert after == before and all(dtype == torch.float32 for part in after for _, dtype in part.values())
    assert all(weight.grad is None for network in networks for weight in network.parameters())
    if stage.startswith("stage"):
        name = "transformer.blocks.0.ffn.net.0.proj.weight"
        assert dict(trainer.teacher.named_parameters())[name].dtype == torch.bfloat16
