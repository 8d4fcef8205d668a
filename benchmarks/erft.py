"""Does error-recycling help where it should? One-pass restoration after contexts with graded mistakes, with and without it.

  python benchmarks/erft.py [--latents data/latents --base models/base --steps 150]     writes results/erft.json

Needs what `make repro` leaves behind in profile tiny. Two teachers learn from the same base model for `--steps` steps,
one with the profile's recycling and one with the chances of every mistake at 0. Then both are shown held-out clips whose
newest six context frames carry mistakes that neither of them made: those of the base model, which names the clip's frames
from a noise level (the higher, the larger its mistakes). Measured is the error of the frames that follow.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from cf_model.data.latents import Latents
from cf_model.evaluate.statistics import bootstrap
from cf_model.model import wan
from cf_model.model.denoiser import Denoiser
from cf_model.model.flow import add_noise, to_x0
from cf_model.train.teacher import Teacher
from tasks import params

GRADES = (0.0, 0.3, 0.5, 0.7, 0.9)  # level that the base model names the context's newest frames from; 0: no mistakes
LEVELS = (0.75, 0.95)  # of the target
STARTS = (42, 63, 84)


def trained(p: params.Params, base: Path, clips: Latents, steps: int, recycle: bool) -> Denoiser:
    errors = replace(p.teacher.errors, warmup=steps // 6)
    if not recycle:
        errors = replace(errors, context=0.0, latent=0.0, noise=0.0)
    teacher = Teacher(replace(p.teacher, steps=steps, errors=errors), model=wan.load(base), latents=clips, flow=p.flow, seed=p.seed)
    began = time.monotonic()
    for number in range(steps):
        loss = teacher.step(number)
        if number % 25 == 24:
            rate = (number + 1) / (time.monotonic() - began)
            print(f"{'with' if recycle else 'without'}: step {number + 1}, {rate:.2f} a second, {loss}", file=sys.stderr, flush=True)
    return teacher.average.model


@torch.no_grad()
def wrong(p: params.Params, models: dict[str, Denoiser], base: Denoiser, clips: Latents) -> dict[str, dict[str, list[list[float]]]]:
    """case -> model -> clip -> mean squared error of the first chunk, one a start."""
    view, rows, rng = p.teacher.view, clips.rows("heldout", at_least=max(STARTS) + p.teacher.target), torch.Generator().manual_seed(1)
    text, found = clips.text(rows), {}
    for start in STARTS:
        clip = clips.window(rows, [0] * len(rows), start + p.teacher.target)
        x, noise = clip[:, start:], torch.randn(clip[:, start:].shape, generator=rng)
        past = clip[:, start - p.base.window : start]
        drawn = torch.randn(past.shape, generator=rng)
        for grade in GRADES:
            context, sigma = clip[:, view.frames(start)].clone(), torch.full((len(rows),), grade)
            if grade:
                named = base(add_noise(past, drawn, sigma), sigma, text)
                context[:, -view.fast :] += (named - past)[:, -view.fast :]
            mistake = (context - clip[:, view.frames(start)])[:, -view.fast :].square().mean().sqrt()
            for level in LEVELS:
                s = torch.full((len(rows),), level)
                x_t = add_noise(x, noise, s)
                case = found.setdefault(f"mistakes from {grade:g}, target at {level:g}", {"rms of the mistakes": [[]]})
                case["rms of the mistakes"][0].append(float(mistake))
                for name, model in models.items():
                    x_0 = to_x0(x_t, view.velocity(model, x_t, s, text, context), s)
                    error = (x_0 - x)[:, :3].square().mean(dim=(1, 2, 3, 4)).tolist()
                    per_clip = case.setdefault(name, [[] for _ in rows])
                    for values, value in zip(per_clip, error, strict=True):
                        values.append(value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=Path, default=Path("data/latents"))
    parser.add_argument("--base", type=Path, default=Path("models/base"))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=HERE / "results/erft.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    p, clips = params.load(HERE.parent / "profiles/tiny.yaml"), Latents(given.latents)
    models = {name: trained(p, given.base, clips, given.steps, name == "with") for name in ("with", "without")}
    rows = []
    for case, errors in wrong(p, models, wan.load(given.base), clips).items():
        mistakes = errors.pop("rms of the mistakes")[0]
        pairs = zip(errors["without"], errors["with"], strict=True)
        gain = {str(n): [a - b for a, b in zip(one, other, strict=True)] for n, (one, other) in enumerate(pairs)}
        change = bootstrap(gain, resamples=2000, seed=0)
        means = {name: round(sum(map(sum, errors[name])) / sum(map(len, errors[name])), 5) for name in models}
        interval = {"mean": round(change.mean, 5), "low": round(change.low, 5), "high": round(change.high, 5)}
        rows.append({"case": case, "rms of the mistakes": round(sum(mistakes) / len(mistakes), 4), "error": means, "gain": interval})
        print(rows[-1], flush=True)
    about = {
        "what": "mean squared error of the first chunk after the context, in one pass; gain = without - with, 95 % interval over clips",
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__},
        "profile": "tiny",
        "steps of each teacher": given.steps,
        "held-out clips": len(clips.rows("heldout", at_least=max(STARTS) + p.teacher.target)),
        "starts in each": len(STARTS),
        "seeds": 1,
    }
    given.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
