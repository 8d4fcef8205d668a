"""What `cf plan` expects of a step's memory, against the bytes of tensors that two steps really hold at most.

  python benchmarks/plan_memory.py         two minutes, profile tiny; writes results/plan-memory.json

Weights and their average are there before the first step. What is compared is what the steps add: optimiser, keys and
values, activations; gradients are not there yet when activations are at their peak, as nothing is accumulated.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
STAGES = ("base", "teacher", "causal_init", "stage2")


class Noise:
    """Clips that are nothing but numbers of the right shape (cf_model/train/trainer/loop.py's Clips)."""

    def __init__(self, shape: tuple[int, int, int], tokens: int, channels: int) -> None:
        import torch

        self.shape, self.empty_text = shape, torch.zeros(tokens, channels)

    def rows(self, split: str, at_least: int = 1) -> list[int]:
        return [0]

    def frames(self, row: int) -> int:
        return 121

    def window(self, rows: list[int], starts: list[int], length: int) -> Any:
        import torch

        return torch.randn(len(rows), length, *self.shape)

    def text(self, rows: list[int]) -> Any:
        return self.empty_text.expand(len(rows), *self.empty_text.shape)


def measure(stage: str, checkpointing: bool) -> dict[str, Any]:
    import torch

    from cf_model.model import wan
    from cf_model.plan import forecast
    from cf_model.train import base, causal_init, student, teacher
    from tasks.params import load
    from tests.allocations import Allocations

    torch.set_num_threads(1)
    p = load.load_params(HERE.parent / "profiles/tiny.yaml")
    p = p.model_copy(update={"compute": replace(p.compute, checkpointing=checkpointing)})
    costs = forecast.estimate_costs(p)
    shape = (costs.channels, costs.height, costs.width)
    models = [wan.build_transformer(p.model, channels=shape[0], text_channels=p.text.channels, seed=i, compute=p.compute) for i in range(3)]
    clips = Noise(shape, p.text.tokens, p.text.channels)
    common: dict[str, Any] = {"model": models[0], "latents": clips, "flow": p.flow, "seed": 0}
    job: Any
    if stage == "base":
        job = base.BaseTrainer(p.base, **common)
    elif stage == "teacher":  # every step with the longest context
        spec = replace(p.teacher, no_context=0.0, fast_only=0.0, shortest=p.teacher.longest)
        job = teacher.TeacherTrainer(spec, **common)
    elif stage == "causal_init":
        job = causal_init.CausalInitTrainer(replace(p.causal_init, begin=1.0), **common)
    else:  # every rollout the longest, the student updated at every step
        long = replace(p.stage2.horizon, shortest=p.stage2.horizon.longest, mode="const")
        spec2 = replace(p.stage2, horizon=long, critic_updates=1)
        named = {"student": models[0], "teacher": models[1], "critic": models[2]}
        prompts = torch.randn(8, p.text.tokens, p.text.channels)
        made: dict[str, Any] = {"view": p.teacher.view, "flow": p.flow, "prompts": prompts, "null": clips.empty_text, "shape": shape}
        job = student.DistillationTrainer(spec2, **named, **made, seed=0)
    with Allocations() as held:
        for number in range(2):
            job.step(number)
    need = forecast.estimate_needs(p)[stage]
    measured, expected = held.peak / 2**20, (need.states()["optimiser"] + need.batch * need.sample_bytes()) / 2**20
    found = {"measured_mib": round(measured, 1), "expected_mib": round(expected, 1), "ratio": round(expected / measured, 2)}
    return {"stage": stage, "checkpointing": checkpointing, **found}


def main() -> None:
    rows = []
    for stage in STAGES:
        for on in (False, True):
            rows.append(measure(stage, on))
            print(rows[-1], flush=True)
    import torch

    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__, "profile": "tiny"}
    (HERE / "results/plan-memory.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
