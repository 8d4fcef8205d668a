"""Peak memory of a stage-2 step against the rollout's length: it grows by the latents and by nothing else.

  python benchmarks/training_memory.py            one process per length; writes results/training-memory.{json,png}

Sizes are those of profile tiny. Each process makes two steps (critic and student) and reports its peak resident memory
above what it held before the first one.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
LENGTHS = (21, 42, 84, 120, 240, 480, 960)


def measure(frames: int, checkpointing: bool) -> dict[str, float]:
    import torch

    from cf_model.model import wan
    from cf_model.model.rollout import HorizonSpec
    from cf_model.train.student import DistillationTrainer
    from tasks.params import load

    torch.set_num_threads(1)
    p = load.load_params(HERE.parent / "profiles/tiny.yaml")
    shape = (p.codec.linear.channels, p.video.height // 8, p.video.width // 8)
    spec = replace(p.stage2, horizon=HorizonSpec(frames, frames, 0, "const"), critic_updates=1, ema_start=0)
    compute = replace(p.compute, checkpointing=checkpointing)
    models = [wan.build_transformer(p.model, channels=shape[0], text_channels=p.text.channels, seed=i, compute=compute) for i in range(3)]
    prompts = torch.randn(8, p.text.tokens, p.text.channels)
    job = DistillationTrainer(
        spec,
        student=models[0],
        teacher=models[1],
        critic=models[2],
        view=p.teacher.view,
        flow=p.flow,
        prompts=prompts,
        null=torch.zeros(p.text.tokens, p.text.channels),
        shape=shape,
        seed=0,
    )
    before = peak()
    for number in range(2):
        job.step(number)
    latents = spec.batch * frames * shape[0] * shape[1] * shape[2] * 4 / 2**20
    return {"frames": frames, "checkpointing": checkpointing, "step_mib": round(peak() - before, 1), "latents_mib": round(latents, 2)}


def peak() -> float:
    """MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def machine() -> dict[str, str | int]:
    import torch

    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30
    return {"cores": os.cpu_count() or 0, "ram_gib": ram, "python": platform.python_version(), "torch": torch.__version__}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(int(sys.argv[1]), sys.argv[2] == "True")))
        return
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    rows = []
    for frames, checkpointing in product(LENGTHS, (False, True)):
        command = [sys.executable, __file__, str(frames), str(checkpointing)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    out = HERE / "results"
    (out / "training-memory.json").write_text(json.dumps({"machine": machine(), "profile": "tiny", "rows": rows}, indent=1) + "\n")
    plot(rows, out / "training-memory.png")


def plot(rows: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.4), layout="constrained")
    for checkpointing, label in ((False, "peak of a step"), (True, "with checkpointing")):
        some = [row for row in rows if row["checkpointing"] == checkpointing]
        axis.plot([row["frames"] for row in some], [row["step_mib"] for row in some], marker="o", label=label)
    axis.axvline(105, color="grey", linestyle=":", linewidth=1)  # 3 + 6 x 12 + 6 + 21
    axis.annotate("teacher's context full", (112, 20), fontsize=8, color="grey")
    axis.plot([row["frames"] for row in some], [row["latents_mib"] for row in some], marker="o", label="the rollout's latents")
    axis.set(xlabel="latent frames of the rollout", ylabel="MiB", ylim=(0, None), title="Memory of a stage-2 step (profile tiny, batch 8)")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
