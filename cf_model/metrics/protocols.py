"""Scores of a traced video by named protocols, which are never mixed: equal names of metrics mean different things in them.

`vbench`: the whole video, as Context Forcing's 60 s columns must be read. `vbench-long`: clips of 2 s, in both variants of
cf_model/metrics/long.py. `vbench-competition`: the same clips and the CLIP score, which Self-Forcing++ aggregates; VBench splits
scenes first, which is not done here, and the protocol's name says so. `windows`: Context Forcing's Table 1. `own`: what no paper defines.
Scores made with a substitute network, or without VBench's filter, carry it in their name behind an @.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cf_model.metrics import drift, flow, long, preprocess, repetition, vbench, windowed
from cf_model.metrics.judge import Judge, measure_agreement, rate_video, score_stability
from cf_model.metrics.trace import Networks, Trace, name_metric

VBENCH, COMPETITION, WINDOWS, OWN = "vbench", "vbench-competition/without-scene-splitting", "windows", "own"
PROTOCOLS = {"vbench": (VBENCH,), "vbench-long": (long.UPSTREAM, long.FIXED), "vbench-competition": (COMPETITION,),
             "windows": (WINDOWS,), "own": (OWN,)}  # fmt: skip
SAMPLED = 8  # middle frames that the CLIP score reads
UNFILTERED = "@unfiltered"  # VBench scores flickering only in videos that its static filter passes, and it needs RAFT

Scores = dict[str, float]
ClipScores = dict[str, list[float]]  # metric -> a score for every clip


def score_range(trace: Trace, networks: Networks, frames: range, text: np.ndarray | None = None) -> Scores:
    """Score the frames of a range by VBench's dimensions, as far as their networks are there; `text` adds the CLIP score.

    Scores of ranges that are too short for a dimension (two frames have no middle one) are absent.
    """
    first, stop = frames.start, frames.stop
    out: Scores = {}
    if "subject" in trace.features:
        out[name_metric("subject_consistency", networks.subject)] = vbench.score_consistency(trace.features["subject"][first:stop])
    if "background" in trace.features:
        rows = trace.features["background"][first:stop]
        out[name_metric("background_consistency", networks.background)] = vbench.score_consistency(rows)
        if text is not None:
            chosen = rows[preprocess.sample_middle_frames(SAMPLED, len(rows))]
            out[name_metric("clip_score", networks.text)] = vbench.score_text(chosen, text)
    out[f"temporal_flickering{UNFILTERED}"] = vbench.score_flicker(trace.differences[first : stop - 1])
    if trace.interpolation is not None and len(frames) > 2:
        out[f"motion_smoothness{networks.interpolator}"] = vbench.score_smoothness(trace.interpolation[first : stop - 2])
    if trace.sampled_flow is not None and networks.make_flow:
        sampled = range(first, stop, vbench.choose_interval(trace.fps))
        scores = trace.sampled_flow[list(sampled[:-1])]
        if not np.isnan(scores).any():
            moves = vbench.decide_motion(scores.tolist(), height=trace.height, width=trace.width, sampled=len(sampled))
            out[f"dynamic_degree@{networks.flow_name}"] = float(moves)
    if "aesthetic" in trace.features and networks.aesthetic_head:
        rows = trace.features["aesthetic"][first:stop]
        out[name_metric("aesthetic_quality", networks.aesthetic)] = vbench.score_aesthetics(rows, *networks.aesthetic_head)
    if trace.imaging is not None:
        out["imaging_quality@plugin"] = vbench.score_imaging(trace.imaging[first:stop])
    return out


def score_clips(trace: Trace, networks: Networks, text: np.ndarray | None = None) -> ClipScores:
    """Score every clip of 2 s of a video."""
    clips = [score_range(trace, networks, clip, text) for clip in long.split_into_clips(trace.frames, trace.fps)]
    return {name: [clip[name] for clip in clips] for name in clips[0]}


def score_first_frames(trace: Trace) -> float | None:
    """Score VBench-Long's fast branch for the subject: DINOv2's consistency of the clips' first frames; None for a single clip."""
    starts = [clip[0] for clip in long.split_into_clips(trace.frames, trace.fps)]
    return vbench.score_consistency(np.stack([trace.anchors[k] for k in starts])) if trace.anchors and len(starts) > 1 else None


def score_long(trace: Trace, networks: Networks) -> list[dict[str, Any]]:
    """Return VBench-Long's cells in both variants: upstream keeps every clip, fixed has one score a video.

    Fixed fuses the subject with its fast branch. DreamSim, the background's fast branch, is not here: that cell is of clips alone.
    """
    cells = []
    fast = score_first_frames(trace)
    for name, scores in score_clips(trace, networks).items():
        cells.append({"protocol": long.UPSTREAM, "metric": name, "value": float(np.mean(scores)), "clips": scores})
        metric, value = name, float(np.mean(scores))
        if name.startswith("subject_consistency") and fast is not None and networks.anchor:
            suffix = f"{networks.anchor.suffix}-fast" if networks.anchor.suffix else ""
            metric, value = name + suffix, long.average_fixed([scores], [fast], long.BOTH, long.MOMENTS["subject_consistency"])
        elif name.startswith("background_consistency"):
            metric = f"{name}@clips-only"
        cells.append({"protocol": long.FIXED, "metric": metric, "value": value})
    return cells


def score_windowed(trace: Trace, networks: Networks, text: np.ndarray | None) -> Scores:
    """Score the windows of Context Forcing's Table 1 that the video fills: dinov2_10s, clip_f_10s, clip_t_10s and so on."""
    out: Scores = {}
    if trace.anchors and networks.anchor:
        rows = np.zeros((trace.frames, len(trace.anchors[0])))
        for k, row in trace.anchors.items():
            rows[k] = row  # frames outside the windows stay zeros, and no window reads them
        out |= {name_metric(f"dinov2_{t}s", networks.anchor): value for t, value in windowed.score_anchored(rows, trace.fps).items()}
    if "background" in trace.features:
        rows = trace.features["background"]
        out |= {name_metric(f"clip_f_{t}s", networks.background): value for t, value in windowed.score_anchored(rows, trace.fps).items()}
        if text is not None:
            scores = windowed.score_prompt(rows, text, trace.fps)
            out |= {name_metric(f"clip_t_{t}s", networks.text): value for t, value in scores.items()}
    return out


def score_own(trace: Trace, networks: Networks, *, chunk: int | None, window: int | None) -> Scores:
    """Score drift, seams, repetition and flow. Seams need the latent frames of a chunk and of the window that the video was made with."""
    out = drift.score_drift(trace.statistics, trace.fps) if trace.frames >= 4 else {}
    if chunk and window:
        out |= drift.score_seams(trace.differences, latents=chunk, window=window)
    if found := repetition.measure_repetition(trace.thumbnails, trace.fps):
        distance, period = found
        out |= {"repeat_distance": distance, "repeat_period": period, "no_repeat": repetition.score_no_repeat([distance])}
    if trace.magnitudes is not None and networks.make_flow and len(trace.magnitudes) >= flow.WINDOW:
        out |= {f"{metric}@{networks.flow_name}": value for metric, value in flow.score_spikes(trace.magnitudes).items()}
    return out


def judge_video(trace: Trace, judge: Judge, prompt: str, *, key: str, repeats: int) -> dict[str, Any]:
    """Return the cell of a video's Visual Stability; a judge that fails makes a cell with its reason instead of a value."""
    ratings = rate_video(judge, trace.preview, trace.preview_fps, prompt, key=key, repeats=repeats)
    cell: dict[str, Any] = {"protocol": OWN, "metric": f"visual_stability@{judge.name}", "rubric": ratings[0].rubric}
    try:
        more: dict[str, Any] = {"value": score_stability(ratings), "agreement": measure_agreement(ratings)}
    except ValueError as error:
        more = {"value": None, "failed": str(error)}
    return cell | more | {"answers": [rating.text for rating in ratings]}


def score_trace(trace: Trace, networks: Networks, protocols: Sequence[str], *, prompt: str | None,
                chunk: int | None = None, window: int | None = None) -> list[dict[str, Any]]:  # fmt: skip
    """Return a video's cells (protocol, metric, value) by the named protocols of PROTOCOLS."""
    text = networks.text.encode_text(prompt) if networks.text and prompt else None
    cells: list[dict[str, Any]] = []
    plain: Mapping[str, Callable[[], Mapping[str, float]]] = {
        VBENCH: lambda: score_range(trace, networks, range(trace.frames)),
        WINDOWS: lambda: score_windowed(trace, networks, text),
        OWN: lambda: score_own(trace, networks, chunk=chunk, window=window),
    }
    for protocol in protocols:
        if protocol == "vbench-long":
            cells += score_long(trace, networks)
        elif protocol == "vbench-competition":
            clips = score_clips(trace, networks, text).items()
            cells += [{"protocol": COMPETITION, "metric": name, "value": float(np.mean(values)), "clips": values} for name, values in clips]
        else:
            cells += [{"protocol": protocol, "metric": name, "value": value} for name, value in plain[protocol]().items()]
    return cells
