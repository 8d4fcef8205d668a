"""The engine by DeepSpeed: gradients averaged, and with ZeRO 1 to 3 moments, gradients and weights split over the ranks.

Weights stay float32, products are as wide as `compute.dtype` says (denoiser.py): bf16 compute with fp32 master weights.
Checkpoints are ours and whole, tensor by tensor as plain torch would write them, so a run can go on with another number of
ranks, another `zero`, or without DeepSpeed. Its own loader, which unpickles, is never called.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .engine import EngineSpec, Optimizer, OptimizerSpec
from .ranks import is_first, rank, ranks

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 50_000_000  # numbers that are sent at once: 200 MB, where DeepSpeed's own default takes 2 GB


def make(model: nn.Module, spec: OptimizerSpec, steps: int, engine: EngineSpec) -> Optimizer:
    if engine.zero and spec.muon_lr:
        stated = f"muon_lr is {spec.muon_lr}, and engine.zero {engine.zero}"
        raise ValueError(f"{stated}: Muon needs whole matrices, which ZeRO splits; use engine.zero: 0, or muon_lr: 0.0")
    deepspeed = imported(next(model.parameters()).device)
    return Sharded(model, spec, steps, engine, deepspeed) if engine.zero else Replicated(model, spec, steps, deepspeed)


def imported(device: torch.device) -> Any:
    """DeepSpeed, ready for this process. It compiles nothing: its operators are optional, and none of them is used."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(rank()))  # which it insists on
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        import deepspeed
        import deepspeed.ops
    except Exception as error:  # also what it says of a CUDA toolkit that it misses
        way = "`make deepspeed` installs it; or use engine.use: torch"
        raise ValueError(f"engine.use asks for DeepSpeed in {ranks()} ranks, but it can't be imported ({error}); {way}") from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its own import sets another
    # Choice: gloo on the CPU. DeepSpeed's operator of shared memory would be compiled for minutes at a first start, and a
    # compilation that is killed leaves a lock at which every later start hangs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        store = torch._C._distributed_c10d.HashStore()
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


def config(stage: int, **more: Any) -> dict[str, Any]:
    """What DeepSpeed is told. Groups of a batch are ours: every backward adds, `step` ends the batch."""
    one = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "managed_gradient_accumulation": False}
    room = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    return {**one, "steps_per_print": 2**31, "gradient_clipping": 0.0, "zero_optimization": {"stage": stage, **room, **more}}


class Replicated(Optimizer):
    """ZeRO 0: DeepSpeed averages the gradients; clip, schedule and step are plain torch's."""

    def __init__(self, model: nn.Module, spec: OptimizerSpec, steps: int, deepspeed: Any) -> None:
        super().__init__(model, spec, steps)
        self.hand = Hand(self)
        self.engine = deepspeed.initialize(model=model, optimizer=self.hand, config=config(0), dist_init_required=False)[0]

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> float:
        self.engine.step()
        self.model.zero_grad(set_to_none=True)
        self.done += 1
        return self.hand.norm


class Hand(torch.optim.Optimizer):
    """What DeepSpeed steps, once the gradients are averaged: all that an `Optimizer` does then."""

    def __init__(self, owner: Optimizer) -> None:
        super().__init__([p for p in owner.model.parameters() if p.requires_grad], {})
        self.owner, self.norm = owner, 0.0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.norm = self.owner.update()


class Sharded(Optimizer):
    """ZeRO 1 to 3, AdamW only."""

    def __init__(self, model: nn.Module, spec: OptimizerSpec, steps: int, engine: EngineSpec, deepspeed: Any) -> None:
        super().__init__(model, spec, steps)
        self.stage = engine.zero
        self.parameters: dict[str, Any] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        offload = {"offload_optimizer": {"device": "cpu"}} if engine.offload == "optimizer" else {}
        told = config(engine.zero, **offload) | {"gradient_clipping": spec.clip, "zero_allow_untested_optimizer": True}
        told |= {"zero_force_ds_cpu_optimizer": False}  # its CPU Adam is one more operator to compile; torch's works too
        made = deepspeed.initialize(model=model, optimizer=self.parts[0][0], config=told, dist_init_required=False)
        self.engine, self.split = made[0], made[1]

    @property
    def weights(self) -> Any:
        return Weights(self)

    def backward(self, loss: Tensor) -> None:
        self.split.clear_backward_seen_flag()  # its own forward says so; without it ZeRO 3 forgets the gradients before this one
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> float:
        self.schedule()
        self.engine.step()
        self.done += 1
        return float(self.engine.get_global_grad_norm())

    # ------------------------------------------------------------------------------------------------- for a checkpoint

    def state_dict(self) -> dict[str, Any]:
        """As plain torch's: moments by the number of their parameter, whole. Every rank must ask."""
        inner, held = self.parts[0][0], dict[int, dict[str, Tensor]]()
        taken = {float(state["step"]) for state in inner.state.values() if "step" in state}
        for number, parameter in enumerate(self.parameters.values()) if taken else ():
            moments = {key: kept(utils().safe_get_full_optimizer_state(parameter, key)) for key in MOMENTS}
            held[number] = {"step": torch.tensor(max(taken)), **moments}
        group = {key: value for key, value in inner.param_groups[0].items() if key != "params"}
        return {"done": self.done, "parts": [{"state": held, "param_groups": [group | {"params": list(range(len(self.parameters)))}]}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]
        held = state["parts"][0]["state"]
        if held:
            self._begin(held[0]["step"])
        for number, parameter in enumerate(self.parameters.values() if held else ()):
            for key in MOMENTS:
                if self.stage == 3:
                    utils().safe_set_local_optimizer_state(parameter, shard(parameter, held[number][key]), key)
                else:
                    utils().safe_set_full_optimizer_state(parameter, held[number][key].to(parameter), key)

    def _begin(self, step: Tensor) -> None:
        """Moments exist from the first update on; here they must before it."""
        flats = self.split.fp32_partitioned_groups_flat if self.stage == 3 else self.split.single_partition_of_fp32_groups
        for flat in flats:
            self.parts[0][0].state[flat] = {"step": step.clone(), **{key: torch.zeros_like(flat) for key in MOMENTS}}
        if self.stage < 3:
            self.split._lazy_init_hp_params_optimizer_state()


class Weights:
    """The model's weights as a checkpoint has them: whole."""

    def __init__(self, owner: Sharded) -> None:
        self.owner = owner

    def state_dict(self) -> dict[str, Tensor]:
        model = self.owner.model
        if self.owner.stage < 3:
            return dict(model.state_dict())
        names = {name for name, _ in model.named_parameters()}
        held = {name: buffer for name, buffer in model.state_dict().items() if name not in names}
        for name, parameter in model.named_parameters():
            with gathered(parameter):
                held[name] = kept(parameter.detach())
        return held

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        model = self.owner.model
        if self.owner.stage < 3:
            model.load_state_dict(state)
            for parameter in self.owner.parameters.values():
                if parameter._hp_mapping is not None:  # a rank has the master weights of some only
                    parameter._hp_mapping.update_hp()
            return
        for name, parameter in model.named_parameters():
            with gathered(parameter, write=True):
                parameter.data.copy_(state[name])
            if parameter.requires_grad:
                utils().safe_set_local_fp32_param(parameter, shard(parameter, state[name]))


def kept(whole: Tensor) -> Tensor:
    """Every rank takes part in making a tensor whole, but only the one that writes keeps it."""
    return whole.cpu().clone() if is_first() else whole.new_empty(0, device="cpu")


def utils() -> Any:
    import deepspeed.utils

    return deepspeed.utils


def gathered(parameter: Any, *, write: bool = False) -> Any:
    """While it lasts the parameter is whole on every rank; with `write` what the first one puts there stays."""
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if write else None)


def shard(parameter: Any, value: Tensor) -> Tensor:
    """This rank's part of a whole tensor, as ZeRO 3 splits it: flat, in equal parts, the last one filled up."""
    size = parameter.ds_tensor.numel()
    flat = torch.nn.functional.pad(value.flatten(), (0, size * ranks() - value.numel()))
    return flat[rank() * size : (rank() + 1) * size].to(parameter.ds_tensor.device, torch.float32)
