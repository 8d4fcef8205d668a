"""CPU seconds of ten training steps of each stage, as the machine is and held to AVX2, which is what most laptops have.

  python -m benchmarks portability            four minutes of one core; writes results/portability.json

Stages, sizes and settings are those of profile tiny, with random weights and latents. The two ways are measured in turn (A B B A),
each time in a process of its own, because the libraries choose their kernels when they are loaded. What is compared is CPU seconds
of the process after two steps to warm up. The goal is a ratio of at most 1.5 for every stage. On a machine without wider
instructions than AVX2 both ways are the same code, and the ratio only shows the spread.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
STAGES = ("base", "teacher", "causal_init", "stage1", "stage2")
# What torch, oneDNN and MKL call it.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
WIDER = ("avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile")  # as /proc/cpuinfo names them
WARM, STEPS, GOAL = 2, 10, 1.5


def build_stage(stage: str, profile: str = "tiny") -> Any:
    """The training object of a stage at a profile's sizes, on random weights and latents."""
    import torch

    from benchmarks.plan_memory import Noise
    from cf_model.model import wan
    from cf_model.plan import forecast
    from cf_model.train import base, causal_init, student, teacher
    from tasks.params import load

    p = load.load_params(HERE.parent / f"profiles/{profile}.yaml")
    costs = forecast.estimate_costs(p)
    shape = (costs.channels, costs.height, costs.width)
    models = [wan.build_transformer(p.model, channels=shape[0], text_channels=p.text.channels, seed=i, compute=p.compute) for i in range(3)]
    for model in models:  # a new head is 0, and with it nothing is promoted by similarity
        torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.05, generator=torch.Generator().manual_seed(0))
    clips = Noise(shape, p.text.tokens, p.text.channels)
    if stage == "base":
        return base.BaseTrainer(p.base, model=models[0], latents=clips, flow=p.flow, seed=0)
    if stage == "teacher":
        return teacher.TeacherTrainer(p.teacher, model=models[0], latents=clips, flow=p.flow, seed=0)
    if stage == "causal_init":
        return causal_init.CausalInitTrainer(p.causal_init, model=models[0], latents=clips, flow=p.flow, seed=0)
    spec = p.stage1 if stage == "stage1" else p.stage2
    return student.DistillationTrainer(
        spec,
        student=models[0],
        teacher=models[1],
        critic=models[2],
        view=replace(p.teacher.view, context=spec.teacher.context),
        flow=p.flow,
        prompts=torch.randn(8, p.text.tokens, p.text.channels, generator=torch.Generator().manual_seed(1)),
        null=clips.empty_text,
        clips=clips,
        shape=shape,
        seed=0,
    )


def measure_stages() -> dict[str, Any]:
    """CPU seconds of `STEPS` steps of each stage in this process, and the instructions that torch uses."""
    import torch

    torch.set_num_threads(1)
    seconds = {}
    for stage in STAGES:
        torch.manual_seed(0)
        trainer = build_stage(stage)
        for number in range(WARM):
            trainer.step(number)
        began = time.process_time()
        for number in range(WARM, WARM + STEPS):
            trainer.step(number)
        seconds[stage] = round(time.process_time() - began, 3)
    return {"capability": torch.backends.cpu.get_cpu_capability(), "seconds": seconds}


def describe_machine() -> dict[str, Any]:
    import torch

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    flags = next((line.split(":")[1].split() for line in info.splitlines() if line.startswith("flags")), [])
    model = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), platform.processor())
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "wider_than_avx2": [flag for flag in WIDER if flag in flags],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load": [round(value, 2) for value in os.getloadavg()],
    }


def main() -> None:
    if sys.argv[1:] == ["--measure"]:
        print(json.dumps(measure_stages()))
        return
    runs: dict[str, list[dict[str, Any]]] = {"native": [], "avx2": []}
    for way in ("native", "avx2", "avx2", "native"):
        words = [sys.executable, "-m", "benchmarks", "portability", "--measure"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(AVX2 if way == "avx2" else {})}
        done = subprocess.run(words, cwd=HERE.parent, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        runs[way].append(json.loads(done.stdout.splitlines()[-1]))
        print(way, json.dumps(runs[way][-1]), flush=True)
    rows = []
    for stage in STAGES:
        medians = {way: statistics.median(run["seconds"][stage] for run in runs[way]) for way in runs}
        rows.append({"stage": stage, **medians, "ratio": round(medians["avx2"] / medians["native"], 3)})
        print(f"{stage:<12} native {medians['native']:7.2f} s   AVX2 {medians['avx2']:7.2f} s   ratio {rows[-1]['ratio']:.2f}")
    worst = max(row["ratio"] for row in rows)
    result = {"machine": describe_machine(), "steps": STEPS, "goal": GOAL, "worst_ratio": worst, "stages": rows, "runs": runs}
    (HERE / "results/portability.json").write_text(json.dumps(result, indent=1) + "\n")
    if worst > GOAL:
        sys.exit(f"the worst ratio is {worst:.2f}, above the goal of {GOAL}: some stage computes in what AVX2 has not")


if __name__ == "__main__":
    main()
