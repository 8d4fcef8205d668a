"""Does error-recycling help where it should? One-pass restoration after contexts with graded mistakes, with and without it.

  python benchmarks/erft.py [--latents data/latents --base models/base --seeds 3]     writes results/erft.json

Needs what `make repro` leaves behind in profile tiny. Per seed two teachers learn from the same base model, for all of the
profile's steps: one as the profile says, the other with nothing added where the first gets a mistake. Both draw the same
numbers, so they see the same clips, prompts, contexts, levels and noise, and differ in the mistakes alone. Then both are shown
held-out clips whose newest context frames (the fast part) carry mistakes that neither of them made: those of the base model,
which names the clip's frames from a noise level (the higher, the larger its mistakes). Measured is the error of the three
frames that follow. Stopped, it goes on: each teacher from its last checkpoint in work/benchmark-erft. Results are written after every seed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Literal

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from cf_model.data.latents import Latents
from cf_model.evaluate.statistics import bootstrap
from cf_model.model import wan
from cf_model.model.denoiser import Denoiser
from cf_model.model.flow import add_noise, to_x0
from cf_model.train.erft import ErrorBank
from cf_model.train.teacher import TeacherTrainer
from cf_model.train.trainer.loop import fit
from tasks.files.atomic import write_atomically as write
from tasks.params import load, schema
from tasks.runner.track import Track

GRADES = (0.0, 0.3, 0.5, 0.7, 0.9)  # level that the base model names the context's newest frames from; 0: no mistakes
LEVELS = (0.5, 0.75, 0.95)  # of the target
STARTS = (30, 42, 54, 63, 72, 84)
Errors = dict[str, list[list[float]]]  # what was seen -> clip -> mean squared error of the first chunk, one a start


class Harmless(ErrorBank):
    """Draws as the other does, and adds nothing."""

    def draw(self, kind: Literal["latent", "noise"], rng: torch.Generator, sigma: float | None = None) -> torch.Tensor | None:
        found = super().draw(kind, rng, sigma)
        return None if found is None else torch.zeros_like(found)


def trained(p: schema.Params, base: Path, clips: Latents, seed: int, recycle: bool, work: Path) -> Denoiser:
    name, spec = f"{'with' if recycle else 'without'}-{seed}", p.teacher
    folder, out = work / name, work / f"{name}-made"
    if not (out / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        teacher = TeacherTrainer(spec, model=wan.load_transformer(base), latents=clips, flow=p.flow, seed=seed)
        if not recycle:
            teacher.bank = Harmless(spec.errors, (spec.target, *clips.shape))
        fit(teacher, Track(name, folder))
        partial = work / f"{name}-partial"
        partial.mkdir(exist_ok=True)
        wan.save_transformer(teacher.ema.model, partial)
        partial.rename(out)
    return wan.load_transformer(out).eval()


@torch.no_grad()
def wrong(p: schema.Params, models: dict[str, Denoiser], base: Denoiser, clips: Latents) -> dict[tuple[float, float], Errors]:
    """(grade, level) -> the errors of each model, and of the last one where it sees no context at all."""
    view, rows, rng = p.teacher.view, clips.rows("heldout", at_least=max(STARTS) + p.teacher.target), torch.Generator().manual_seed(1)
    text, found = clips.text(rows), {}
    alone = replace(view, context="none")
    for start in STARTS:
        clip = clips.window(rows, [0] * len(rows), start + p.teacher.target)
        x, noise = clip[:, start:], torch.randn(clip[:, start:].shape, generator=rng)
        past = clip[:, start - p.base.window : start]
        drawn = torch.randn(past.shape, generator=rng)
        for grade in GRADES:
            context, sigma = clip[:, view.context_frames(start)].clone(), torch.full((len(rows),), grade)
            if grade:
                named = base(add_noise(past, drawn, sigma), sigma, text)
                context[:, -view.past_fast :] += (named - past)[:, -view.past_fast :]
            mistake = (context - clip[:, view.context_frames(start)])[:, -view.past_fast :].square().mean(dim=(1, 2, 3, 4)).sqrt()
            for level in LEVELS:
                s = torch.full((len(rows),), level)
                x_t = add_noise(x, noise, s)
                case = found.setdefault((grade, level), {})
                errors = {name: view.velocity(model, x_t, s, text, context) for name, model in models.items()}
                errors["no context"] = alone.velocity(models["without"], x_t, s, text, context[:, :0])
                for name, velocity in errors.items():
                    note(case, name, (to_x0(x_t, velocity, s) - x)[:, :3].square().mean(dim=(1, 2, 3, 4)))
                note(case, "rms of the mistakes", mistake)
    return found


def note(case: Errors, name: str, values: torch.Tensor) -> None:
    for held, value in zip(case.setdefault(name, [[] for _ in values]), values.tolist(), strict=True):
        held.append(value)


def interval(one: list[list[float]], other: list[list[float]]) -> dict[str, float]:
    """Of one - other; the clip is what is resampled, whatever starts, cases and seeds it was shown with."""
    gain = {str(n): [a - b for a, b in zip(first, second, strict=True)] for n, (first, second) in enumerate(zip(one, other, strict=True))}
    change = bootstrap(gain, resamples=5000, seed=0)
    return {"mean": round(change.mean, 5), "low": round(change.low, 5), "high": round(change.high, 5)}


def joined(parts: list[list[list[float]]]) -> list[list[float]]:
    return [list(chain(*of_one_clip)) for of_one_clip in zip(*parts, strict=True)]


def mean(values: list[list[float]]) -> float:
    return round(sum(map(sum, values)) / sum(map(len, values)), 5)


def table(seeds: list[dict[tuple[float, float], Errors]]) -> list[dict[str, object]]:
    """A row a case, and one for every graded case together, whose gain is also that of each seed alone."""
    cases = {f"mistakes from {grade:g}, target at {level:g}": [(grade, level)] for grade, level in seeds[0]}
    cases["all with mistakes"] = [(grade, level) for grade, level in seeds[0] if grade]
    cases["all without mistakes"] = [(grade, level) for grade, level in seeds[0] if not grade]
    rows: list[dict[str, object]] = []
    for case, keys in cases.items():
        held = {name: [joined([one[key][name] for key in keys]) for one in seeds] for name in seeds[0][keys[0]]}
        every = {name: joined(parts) for name, parts in held.items()}
        clean = joined([joined([one[0.0, level]["without"] for _, level in keys]) for one in seeds])
        row: dict[str, object] = {"case": case, "rms of the mistakes": mean(every.pop("rms of the mistakes"))}
        row["error"] = {name: mean(values) for name, values in every.items()}
        row["harm of the mistakes, without"] = interval(every["without"], clean)
        row["gain"] = interval(every["without"], every["with"])
        row["gain of each seed"] = [interval(a, b) for a, b in zip(held["without"], held["with"], strict=True)]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=Path, default=Path("data/latents"))
    parser.add_argument("--base", type=Path, default=Path("models/base"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("work/benchmark-erft"))
    parser.add_argument("--out", type=Path, default=HERE / "results/erft.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    p, clips, done = load.load_params(HERE.parent / "profiles/tiny.yaml"), Latents(given.latents), []
    about = {
        "what": "mean squared error of the first chunk after the context, in one pass; gain = without - with, harm = with these mistakes "
        "- with none; 95 % intervals over clips, which say nothing of other training runs: see the seeds",
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__},
        "profile": "tiny",
        "steps of each teacher": p.teacher.steps,
        "held-out clips": len(clips.rows("heldout", at_least=max(STARTS) + p.teacher.target)),
        "starts in each": len(STARTS),
    }
    for seed in range(p.seed, p.seed + given.seeds):
        models = {name: trained(p, given.base, clips, seed, name == "with", given.work) for name in ("with", "without")}
        done.append(wrong(p, models, wan.load_transformer(given.base).eval(), clips))
        rows = table(done)
        write(given.out, json.dumps(about | {"seeds": len(done), "rows": rows}, indent=1) + "\n")
        print(json.dumps(rows[-2:], indent=1), flush=True)


if __name__ == "__main__":
    main()
