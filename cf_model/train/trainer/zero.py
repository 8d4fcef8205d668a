"""Optimisers by DeepSpeed: average gradients over the ranks, and with ZeRO 1 to 3 split moments, gradients and weights among them.

`build_optimizer` chooses between these and plain torch's (engine.py). Weights stay float32, matrix products have the width of
`compute.dtype` (denoiser.py): bf16 compute with fp32 master weights. Checkpoints are written by this project, in whole tensors as
plain torch has them, so a run can go on with another number of ranks, another `zero`, or without DeepSpeed. DeepSpeed's own loader,
which unpickles, is never called.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cf_model.model.precision import forget_copies

from .engine import EngineSpec, Optimizer, OptimizerSpec
from .ranks import count_ranks, get_rank, is_first_rank

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET_NUMBERS = 50_000_000  # that are sent at once: 200 MB in float32; DeepSpeed's default takes 2 GB
# Names of DeepSpeed that no documentation promises, which is why requirements/deepspeed.txt pins one version: by where they are found
# once DeepSpeed is imported, and by where once it has taken a model.
IMPORTED_NAMES = {
    "ops": ("__compatible_ops__",),
    "zero": ("GatheredParameters",),
    "utils": (
        "safe_get_full_optimizer_state",
        "safe_set_full_optimizer_state",
        "safe_set_local_optimizer_state",
        "safe_set_local_fp32_param",
    ),
    "runtime.engine.DeepSpeedEngine": ("coalesce_grad_reduction", "get_global_grad_norm"),
    "runtime.base_optimizer.ZeROOptimizer": ("clear_backward_seen_flag",),
    "runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer": ("_lazy_init_hp_params_optimizer_state",),
}
OPTIMIZER_NAMES = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups", 3: "fp32_partitioned_groups_flat"}
PARAMETER_NAMES = {1: "_hp_mapping", 2: "_hp_mapping", 3: "ds_tensor"}


def build_optimizer(model: nn.Module, spec: OptimizerSpec, steps: int, engine: EngineSpec) -> Optimizer:
    """Build a network's optimiser: plain torch's, or DeepSpeed's, which may split the model, so copy the model before.

    Raises ValueError for Muon with split matrices, and where DeepSpeed can't be imported.
    """
    if not engine.is_deepspeed:
        return Optimizer(model, spec, steps)
    if engine.zero and spec.muon_lr:
        problem = f"muon_lr is {spec.muon_lr}, and engine.zero {engine.zero}"
        raise ValueError(f"{problem}: Muon needs whole matrices, which ZeRO splits; use engine.zero: 0, or muon_lr: 0.0")
    deepspeed = _import_deepspeed(next(model.parameters()).device)
    return ShardedOptimizer(model, spec, steps, engine, deepspeed) if engine.zero else ReplicatedOptimizer(model, spec, steps, deepspeed)


def gather_weights(model: nn.Module) -> Iterator[Tensor]:
    """Yield a model's weights one by one, each gathered from the ranks where ZeRO 3 has split it."""
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id"):
            with _gather_parameter(parameter):
                yield parameter
        else:
            yield parameter


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed and make it ready for this process. Nothing is compiled, because none of its optional operators is used.

    Raises ValueError where DeepSpeed is not installed or can't start.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(get_rank()))  # DeepSpeed refuses to start without
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    try:
        import deepspeed
        import deepspeed.ops
    except Exception as error:  # more than ImportError: a missing CUDA toolkit raises an exception of DeepSpeed's own
        way = "`make deepspeed` installs it; or use engine.use: torch"
        raise ValueError(f"engine.use asks for DeepSpeed in {count_ranks()} ranks, but it can't be imported ({error}); {way}") from None
    for place, names in IMPORTED_NAMES.items():
        for name in names:
            check_name(deepspeed, f"{place}.{name}")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # again, because importing DeepSpeed sets the level
    # Choice: gloo on the CPU. DeepSpeed's operator of shared memory would be compiled for minutes at a first start, and a
    # compilation that is killed leaves a lock at which every later start hangs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        store = torch._C._distributed_c10d.HashStore()
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


def check_name(deepspeed: Any, path: str, found_in: Any = None) -> None:
    """Raise ValueError where DeepSpeed lacks a name: `path` from the package on, or an attribute of the object `found_in`."""
    try:
        attrgetter(path)(deepspeed if found_in is None else found_in)
    except AttributeError:
        problem = f"deepspeed {deepspeed.__version__} has no {path}, which cf_model/train/trainer/zero.py needs"
        raise ValueError(f"{problem}; `make deepspeed` installs the version that has it, or use engine.use: torch") from None


def _build_config(stage: int, **more: Any) -> dict[str, Any]:
    """Build DeepSpeed's configuration for a ZeRO stage. DeepSpeed sees no groups of a batch: every backward adds, `step` ends the batch.

    Stages 0 and 1 then reduce in `step`, and stage 3 in every backward. So would stage 2, where `ShardedOptimizer` collects instead.
    """
    batch = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "managed_gradient_accumulation": stage == 2}
    buckets = {"reduce_bucket_size": BUCKET_NUMBERS, "allgather_bucket_size": BUCKET_NUMBERS}
    return {**batch, "steps_per_print": 2**31, "gradient_clipping": 0.0, "zero_optimization": {"stage": stage, **buckets, **more}}


class ReplicatedOptimizer(Optimizer):
    """ZeRO 0: DeepSpeed averages the gradients; `Optimizer` clips, schedules and steps."""

    def __init__(self, model: nn.Module, spec: OptimizerSpec, steps: int, deepspeed: Any) -> None:
        super().__init__(model, spec, steps)
        self.callback = UpdateCallback(self)
        self.engine = deepspeed.initialize(model=model, optimizer=self.callback, config=_build_config(0), dist_init_required=False)[0]

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> Tensor:
        self.engine.step()
        self.model.zero_grad(set_to_none=True)
        forget_copies(self.model)
        self.done += 1
        return self.callback.norm


class UpdateCallback(torch.optim.Optimizer):
    """The torch optimiser that DeepSpeed steps once the gradients are averaged: calls `Optimizer.update` and keeps the norm."""

    def __init__(self, owner: Optimizer) -> None:
        super().__init__([p for p in owner.model.parameters() if p.requires_grad], {})
        self.owner, self.norm = owner, torch.zeros(())

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.norm = self.owner.update()


class ShardedOptimizer(Optimizer):
    """ZeRO 1 to 3, AdamW only: 1 splits the moments, 2 the gradients too, 3 the weights too."""

    def __init__(self, model: nn.Module, spec: OptimizerSpec, steps: int, engine: EngineSpec, deepspeed: Any) -> None:
        super().__init__(model, spec, steps)
        self.stage = engine.zero
        self.parameters: dict[str, Any] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        offload = {"offload_optimizer": {"device": "cpu"}} if engine.offload == "optimizer" else {}
        config = _build_config(engine.zero, **offload) | {"gradient_clipping": spec.clip, "zero_allow_untested_optimizer": True}
        config |= {"zero_force_ds_cpu_optimizer": False}  # DeepSpeed's CPU Adam would have to be compiled; torch's works too
        self.collecting = ExitStack()
        self.is_collecting = False
        # `split` is DeepSpeed's optimiser around torch's AdamW
        self.engine, self.split, *_ = deepspeed.initialize(model=model, optimizer=self.parts[0][0], config=config, dist_init_required=False)
        check_name(deepspeed, OPTIMIZER_NAMES[self.stage], self.split)
        for parameter in list(self.parameters.values())[:1]:
            check_name(deepspeed, PARAMETER_NAMES[self.stage], parameter)

    @property
    def weights(self) -> Any:
        return GatheredWeights(self)

    def backward(self, loss: Tensor) -> None:
        # Choice: with ZeRO 2 a rank's gradients are summed over chunks and groups, and reduced once when `step` closes the collection.
        if self.stage == 2 and not self.is_collecting:
            self.collecting.enter_context(self.engine.coalesce_grad_reduction())
            self.is_collecting = True
        # DeepSpeed's own forward, which is not called here, does this; without it ZeRO 3 drops the gradients of the groups before
        self.split.clear_backward_seen_flag()
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> Tensor:
        self.schedule()
        self.collecting.close()
        self.is_collecting = False
        self.engine.step()
        forget_copies(self.model)
        self.done += 1
        return torch.as_tensor(self.engine.get_global_grad_norm())

    def state_dict(self) -> dict[str, Any]:
        """Return the state in plain torch's form: whole moments by their parameter's number.

        Every rank must call, because gathering is done together; only the first rank gets the tensors.
        """
        inner, states = self.parts[0][0], dict[int, dict[str, Tensor]]()
        updates = {float(state["step"]) for state in inner.state.values() if "step" in state}
        for number, parameter in enumerate(self.parameters.values()) if updates else ():
            moments = {key: _copy_on_first_rank(_import_deepspeed_utils().safe_get_full_optimizer_state(parameter, key)) for key in MOMENTS}
            states[number] = {"step": torch.tensor(max(updates)), **moments}
        group = {key: value for key, value in inner.param_groups[0].items() if key != "params"}
        return {"done": self.done, "parts": [{"state": states, "param_groups": [group | {"params": list(range(len(self.parameters)))}]}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]
        states = state["parts"][0]["state"]
        if states:
            self._create_moments(states[0]["step"])
        for number, parameter in enumerate(self.parameters.values() if states else ()):
            for key in MOMENTS:
                if self.stage == 3:
                    _import_deepspeed_utils().safe_set_local_optimizer_state(parameter, _cut_shard(parameter, states[number][key]), key)
                else:
                    _import_deepspeed_utils().safe_set_full_optimizer_state(parameter, states[number][key].to(parameter), key)

    def _create_moments(self, step: Tensor) -> None:
        """Create the moments, because DeepSpeed does so at the first update and a checkpoint is loaded before that."""
        flats = self.split.fp32_partitioned_groups_flat if self.stage == 3 else self.split.single_partition_of_fp32_groups
        # AdamW here sees one flat tensor for each parameter group's part on this rank.
        for flat in flats:
            self.parts[0][0].state[flat] = {"step": step.clone(), **{key: torch.zeros_like(flat) for key in MOMENTS}}
        if self.stage < 3:
            self.split._lazy_init_hp_params_optimizer_state()


class GatheredWeights:
    """The model's weights for a checkpoint: whole tensors, gathered from the ranks and split again."""

    def __init__(self, owner: ShardedOptimizer) -> None:
        self.owner = owner

    def state_dict(self) -> dict[str, Tensor]:
        model = self.owner.model
        # ZeRO 1 and 2 leave the weights whole on every rank.
        if self.owner.stage < 3:
            return dict(model.state_dict())
        names = {name for name, _ in model.named_parameters()}
        state = {name: buffer for name, buffer in model.state_dict().items() if name not in names}
        for name, parameter in model.named_parameters():
            with _gather_parameter(parameter):
                state[name] = _copy_on_first_rank(parameter.detach())
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        model = self.owner.model
        if self.owner.stage < 3:
            model.load_state_dict(state)
            for parameter in self.owner.parameters.values():
                if parameter._hp_mapping is not None:  # a rank has the master weights of its part only
                    parameter._hp_mapping.update_hp()
            return
        # ZeRO 3: write the whole tensor once, then set this rank's part of the float32 master weights.
        for name, parameter in model.named_parameters():
            with _gather_parameter(parameter, write=True):
                parameter.data.copy_(state[name])
            if parameter.requires_grad:
                _import_deepspeed_utils().safe_set_local_fp32_param(parameter, _cut_shard(parameter, state[name]))


def _copy_on_first_rank(whole: Tensor) -> Tensor:
    """Copy a gathered tensor to the CPU on the first rank, which writes; other ranks get an empty tensor to save memory."""
    return whole.cpu().clone() if is_first_rank() else whole.new_empty(0, device="cpu")


def _import_deepspeed_utils() -> Any:
    import deepspeed.utils

    return deepspeed.utils


def _gather_parameter(parameter: Any, *, write: bool = False) -> Any:
    """Return a context in which the parameter is whole on every rank; with `write` the first rank's values are scattered at its end."""
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if write else None)


def _cut_shard(parameter: Any, value: Tensor) -> Tensor:
    """Cut this rank's part out of a whole tensor as ZeRO 3 does: flattened, in equal parts, the last part padded with zeros."""
    size = parameter.ds_tensor.numel()
    flat = torch.nn.functional.pad(value.flatten(), (0, size * count_ranks() - value.numel()))
    return flat[get_rank() * size : (get_rank() + 1) * size].to(parameter.ds_tensor.device, torch.float32)
