"""A made-up project for the tests of the report: what the stages before it leave behind, small and with invented numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import av
import numpy as np

from cf_model.model.memory import MemorySpec
from cf_model.model.view import TeacherView
from tasks.params import load
from tasks.params import schema as types

ROOT = Path(__file__).parents[2]
FPS = 16
EVIL = 'a <script>alert("x")</script> & "quoted" disc'
COLOURS = ("red", "green", "blue", "cyan")


def view(context: Literal["sparse", "none"], slow: int) -> TeacherView:
    return TeacherView(context, 3, slow, 6, 6, 3, "zero", "joint")


def system(weights: Literal["base", "teacher", "causal_init", "stage1", "stage2"], past: MemorySpec | TeacherView) -> types.System:
    memory, seen = (past, None) if isinstance(past, MemorySpec) else (None, past)
    return types.System(weights=weights, memory=memory, view=seen, frames=21)


def make_params(profile: str = "tiny", source: str = "worlds", shown: Literal["memory", "contiguous"] = "memory") -> types.Params:
    """Only the sections the report reads: what else a profile holds is none of its business. `shown` to stage 2's teacher."""
    tiny = load.load_params(ROOT / "profiles/tiny.yaml")
    slow = MemorySpec(3, 12, 6, "similarity", 0.95, "raw", 2, 1, "first", "evict", "clean", "none", "global", "anchored", "all")
    systems = {"base": system("base", view("none", 0)), "causal_init": system("causal_init", slow)}
    systems |= {"stage1": system("stage1", slow), "stage2": system("stage2", slow)}
    continuations = {"teacher": system("teacher", view("sparse", 12))}
    continuations |= {"teacher-fast": system("teacher", view("sparse", 0)), "teacher-none": system("teacher", view("none", 0))}
    continuations |= {"stage1": system("stage1", slow), "stage2": system("stage2", slow)}
    return types.Params.model_construct(
        profile=profile,
        seed=7,
        watch=list(tiny.watch),
        filter=tiny.filter,
        video=types.Video(height=32, width=32, fps=FPS),
        clips=types.Clips.model_construct(source=source, folder=None),
        teacher=tiny.teacher,
        stage2=replace(tiny.stage2, teacher=replace(tiny.stage2.teacher, context=shown)),
        generate=types.Generate.model_construct(
            prompts=10, continued=10, continued_beside=10, prefix=11, seeds=[0, 1], systems=systems, continuations=continuations
        ),
        evaluate=types.Evaluate.model_construct(gap=5.0, resamples=200, choices=4),
    )


# x264 without what reads memory that was never written (cf_model/data/video.py), so that the same frames give the same file
EVEN = {"crf": "20", "mbtree": "0", "preset": "veryfast"}


def write_mp4(path: Path, frames: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt, stream.options = frames.shape[1], frames.shape[2], "yuv420p", EVEN
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def drawn(caption: str, place: int, frames: int) -> np.ndarray:
    t, y, x = np.mgrid[0:frames, 0:32, 0:32]
    return np.stack([(x * 5 + t * 3 + place * 20) % 256, (y * 7) % 256, (x + y + t) * 3 % 256], -1).astype(np.uint8)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))


def caption(k: int) -> str:
    sky, speed = ("day", "night", "fog")[k % 3], ("slow", "fast")[k % 2]
    return EVIL if k == 1 else f"a {COLOURS[k % 4]} disc in the {sky} , the camera pans {speed}"


MEASURED = {
    "prompts": (
        "luma_drift",
        "colour_drift",
        "sharpness_drift",
        "compass_coherence",
        "sky_accuracy",
        "sprite_recall",
        "sharpness",
        "motion",
        "headings_covered",
        "memory_ratio",
        "new_metric",
        "dinov2_10s@pooled-8x8",
    ),
    "continuations": ("map_error", "map_error_recent", "sharpness"),
}


def write_project(
    root: Path, params: types.Params, *, prompts: int = 10, seconds: float = 5, draw: Callable[[str, int, int], np.ndarray] = drawn
) -> dict[str, Path]:
    """What the stages before leave behind, in the formats of the pipeline, with made-up numbers."""
    rng = np.random.default_rng(0)
    index: list[dict[str, Any]] = []
    cells: list[dict[str, Any]] = []
    curves = ["suite,system,metric,second,mean,low,high"]
    for suite, systems in (("prompts", params.generate.systems), ("continuations", params.generate.continuations)):
        for place, name in enumerate(["real", *systems] if suite == "prompts" else systems):
            for k in range(prompts):
                for seed in (0,) if name == "real" else (0, 1):
                    file = f"{suite}/{name}/{k:05d}-s{seed}.mp4"
                    row = {"suite": suite, "system": name, "prompt": caption(k), "clip": f"clip-{k:05d}", "seed": seed, "file": file}
                    index.append(row | {"prefix_frames": 41 if suite == "continuations" else 0})
                    if seed == 0 and name.startswith("stage"):
                        write_held(root / "samples" / file, 41 if suite == "continuations" else 0, round(seconds * FPS) + 1)
                        events = [{"kind": "stall", "second": 3.25, "seconds": 1.5, "size": 0.01}] if k == 2 else []
                        cells.append(row | {"metric": "failures", "value": len(events), "events": events})
                    if seed == 0:
                        write_mp4(root / "samples" / file, draw(caption(k), place + k, round((5 if name == "base" else seconds) * FPS) + 1))
                    for metric in MEASURED[suite]:
                        if metric != "memory_ratio" or k % 3:  # does not apply to each video
                            cells.append(row | {"metric": metric, "value": float(1 - 0.1 * place + rng.normal() * 0.04 + k * 0.01)})
            for second in range(0, round(seconds) + 1):
                for metric in ("sharpness", "sky_error"):
                    middle = 5 + place + rng.normal() * 0.2 + second * 0.03 * place
                    curves.append(f"{suite},{name},{metric},{second},{middle:.4f},{middle - 0.5:.4f},{middle + 0.5:.4f}")
    jsonl(root / "samples/index.jsonl", index)
    jsonl(root / "results/cells.jsonl", cells)
    (root / "results/curves.csv").write_text("\n".join(curves) + "\n")
    write_metrics(root, params)
    write_clips(root)
    return {
        "results": root / "results",
        "samples": root / "samples",
        "metrics": root / "metrics",
        "models": root / "models",
        "data": root / "data/manifest.jsonl",
        "clips": root / "data/clips",
        "out": root / "reports",
    }


def write_held(video: Path, prefix: int, frames: int) -> None:
    """What the stage generate writes of a causal system's memory: in every chunk of three latent frames, the parts' frames."""
    first, latents = (prefix + 3) // 4, (frames + 3) // 4
    rows = [
        {"now": [n, n + 1, n + 2], "sink": [0, 1, 2], "slow": list(range(6, max(6, n - 3), 6)), "fast": list(range(max(3, n - 3), n))}
        for n in range(first, latents - 2, 3)
    ]
    video.parent.mkdir(parents=True, exist_ok=True)
    video.with_suffix(".json").write_text(json.dumps(rows))


def write_metrics(root: Path, params: types.Params) -> None:
    names = ["real", *params.generate.systems]
    system_level = {name: {"diversity": 40.0 - 9 * k, "heading_perplexity": 10.0 - k} for k, name in enumerate(names)}
    system_level["stage2"]["blind_guess_hits"] = 7
    (root / "metrics").mkdir()
    (root / "metrics/evaluate.json").write_text(json.dumps({"prompts": system_level}))
    (root / "metrics/filter.json").write_text(json.dumps({"kept": 3, "rejected": 2, "seconds_kept": 1530.5}))
    (root / "metrics/report.json").write_text(json.dumps({"a_stale_number_of_the_run_before": 1}))
    rng = np.random.default_rng(1)
    for stage in ("base", "stage1", "stage2"):
        loss = np.exp(-np.arange(150) / 50) + 0.4 + rng.normal(size=150) * 0.05
        rows = [{"step": k, "loss": float(v), "grad_norm": float(abs(rng.normal()) + 0.1)} for k, v in enumerate(loss)]
        rows[3]["grad_norm"] = None  # not finite when it was logged
        jsonl(root / f"models/{stage}/metrics.jsonl", cast(list[dict[str, Any]], rows))


def write_clips(root: Path) -> None:
    good = {"caption": EVIL, "fps": 16.0, "frames": 481, "width": 32, "height": 32, "seconds": 30.0}
    kept = {"kept": True, "reason": None, "value": None, "rule": None}
    values = [{"too_short": 9.0 + k, "frozen": 1.0 + k} for k in range(6)]
    manifest = [{"id": f"clip-{k:05d}", **good, **kept, "split": "heldout" if k else "train"} for k in range(3)]
    bad = [("too_short", 8.0, "seconds > 10.0"), ("hard_cut", 31.4, "cut < 6.0"), ("unreadable", None, None)]
    manifest += [
        {"id": f"clip-{3 + k:05d}", **good, "kept": False, "reason": why, "value": value, "rule": rule, "split": None}
        for k, (why, value, rule) in enumerate(bad)
    ]
    manifest = [row | {"file": f"{row['id']}.mp4", "values": values[k]} for k, row in enumerate(manifest)]
    for row in manifest[1:]:  # the first one's file is absent
        write_mp4(root / "data/clips" / str(row["file"]), drawn("", len(str(row["id"])), 3 * FPS))
    jsonl(root / "data/manifest.jsonl", manifest)
    planted = [None, None, None, "too_short", "hard_cut", "truncated"]
    clips = [{"id": row["id"], "caption": EVIL, "planted": kind} for row, kind in zip(manifest, planted, strict=True)]
    jsonl(root / "data/clips/clips.jsonl", clips)
