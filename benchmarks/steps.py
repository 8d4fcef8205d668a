"""Every setting of a distillation step side by side: seconds, what they go into, and peak memory.

  python benchmarks/steps.py [NAME ...]     all of them, or those named; writes results/steps.json

Stage 2 of profile tiny with rollouts of 84 latent frames (21 s), random weights, one thread. Each setting makes one cycle of
steps (up to an update of the student) to warm up, one that is timed, and one whose tensors are counted, every storage from
the operation that makes it to its end. CPU seconds of the process, so that what else the machine does counts little; run again
with a name, a row is replaced. A row says how it differs from the first one.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from cf_model.model import wan
from cf_model.model.rollout import HorizonSpec
from cf_model.train.student import DistillationTrainer
from cf_model.train.trainer.engine import EngineSpec
from tasks.params import load
from tests.allocations import Allocations

FRAMES = 84
Plan = dict[str, Any]  # spec, view, compute, engine


def spec(**changes: Any) -> Callable[[Plan], Plan]:
    return lambda plan: plan | {"spec": replace(plan["spec"], **changes)}


def rolled(**changes: Any) -> Callable[[Plan], Plan]:
    return lambda plan: plan | {"spec": replace(plan["spec"], rollout=replace(plan["spec"].rollout, **changes))}


def scored(**changes: Any) -> Callable[[Plan], Plan]:
    return lambda plan: plan | {"spec": replace(plan["spec"], teacher=replace(plan["spec"].teacher, **changes))}


def viewed(**changes: Any) -> Callable[[Plan], Plan]:
    return lambda plan: plan | {"view": replace(plan["view"], **changes)}


def both(*parts: Callable[[Plan], Plan]) -> Callable[[Plan], Plan]:
    def change(plan: Plan) -> Plan:
        for part in parts:
            plan = part(plan)
        return plan

    return change


SETTINGS: dict[str, Callable[[Plan], Plan]] = {
    "tiny, 84 frames": spec(),
    "critic_updates 1": spec(critic_updates=1),
    "critic_updates 5": spec(critic_updates=5),
    "rollouts shared": spec(rollouts="shared"),
    # a stream begins before what a memory holds by then, so its teacher is shown a stride
    "persist stream": both(scored(context="sparse"), rolled(persist="stream")),
    "guidance_passes together": scored(guidance_passes="together"),
    "context_pass own": viewed(context_pass="own"),
    "context_pass own, guidance_passes together": both(viewed(context_pass="own"), scored(guidance_passes="together")),
    "context none": scored(context="none"),
    "checkpointing": lambda plan: plan | {"compute": replace(plan["compute"], checkpointing=True)},
    "checkpointing, context_pass own": lambda plan: viewed(context_pass="own")(SETTINGS["checkpointing"](plan)),
    "gradient on all 7 chunks (full_first 0, skip_first 0)": rolled(full_first=0, skip_first=0),
    "gradient on 3 of 7 chunks (full_first 4, skip_first 4)": rolled(full_first=4, skip_first=4),
    "place uniform": rolled(place="uniform"),
    "place beta": rolled(place="beta"),
    "exit last": rolled(exit="last"),
    "exit last, renoise own": rolled(exit="last", renoise="own"),
    "micro_batch 2 (4 groups)": lambda plan: plan | {"engine": replace(plan["engine"], micro_batch=2)},
    "rollouts shared, context_pass own, guidance_passes together": both(
        spec(rollouts="shared"), viewed(context_pass="own"), scored(guidance_passes="together")
    ),
}


def job(change: Callable[[Plan], Plan]) -> DistillationTrainer:
    p = load.load_params(HERE.parent / "profiles/tiny.yaml")
    # Rollouts of the student's own, a new one at every step and no warm-up of the critic, so that each cycle of steps is like the others.
    own = replace(p.stage2.rollout, begin="own")
    first = replace(p.stage2, rollouts="each", critic_warmup=0, rollout=own, horizon=HorizonSpec(FRAMES, FRAMES, 0, "const"))
    plan = change({"spec": first, "view": p.teacher.view, "compute": p.compute, "engine": EngineSpec("torch", 0, "none", None)})
    shape = (p.codec.linear.channels, p.video.height // 8, p.video.width // 8)
    built = {"channels": shape[0], "text_channels": p.text.channels, "compute": plan["compute"]}
    models = [wan.build_transformer(p.model, **built, seed=i) for i in range(3)]
    for model in models:  # as built, nothing comes out
        torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.05, generator=torch.Generator().manual_seed(0))
    text = torch.randn(8, p.text.tokens, p.text.channels, generator=torch.Generator().manual_seed(1))
    return DistillationTrainer(
        plan["spec"],
        student=models[0],
        teacher=models[1],
        critic=models[2],
        view=replace(plan["view"], context=plan["spec"].teacher.context),
        flow=p.flow,
        prompts=text,
        null=torch.zeros(p.text.tokens, p.text.channels),
        shape=shape,
        seed=0,
        engine=plan["engine"],
    )


def measure(name: str) -> dict[str, Any]:
    made, number = job(SETTINGS[name]), count()
    cycle = made.spec.critic_updates
    warm = cycle if made.spec.rollout.persist == "fresh" else 2 * cycle  # until a stream is as long as the other rollouts
    for _ in range(warm):
        made.step(next(number))
    spent: dict[str, float] = {}
    began, wall = time.process_time(), time.perf_counter()
    for _ in range(cycle):
        made.timer.start()
        made.step(next(number))
        for part, seconds in made.timer.read_seconds().items():
            spent[part] = spent.get(part, 0.0) + seconds
    cpu, wall = (time.process_time() - began) / cycle, (time.perf_counter() - wall) / cycle
    whole = spent.pop("step")
    with Allocations() as held:
        for _ in range(cycle):
            made.step(next(number))
    row = {"setting": name, "cpu_seconds_a_step": round(cpu, 3), "steps_a_second": round(1 / cpu, 3), "wall_seconds_a_step": round(wall, 3)}
    return row | {"peak_mib": round(held.peak / 2**20, 1), "shares": {part: round(value / whole, 3) for part, value in spent.items()}}


def main() -> None:
    torch.set_num_threads(1)
    out = HERE / "results/steps.json"
    held = {row["setting"]: row for row in json.loads(out.read_text())["rows"]} if out.exists() else {}
    for name in sys.argv[1:] or SETTINGS:
        held[name] = measure(name)
        print(json.dumps(held[name]), flush=True)
        about = {
            "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__},
            "load": os.getloadavg(),
        }
        text = json.dumps(about | {"profile": "tiny", "frames": FRAMES, "rows": [held[n] for n in SETTINGS if n in held]}, indent=1)
        partial = out.with_suffix(".partial")
        partial.write_text(text + "\n")
        partial.rename(out)


if __name__ == "__main__":
    main()
