"""Stage `generate`: videos of every system x prompt x seed, and continuations of real prefixes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cf_model.codec.codec_file import load_codec
from cf_model.codec.interface import SPACE, Codec, video_frames
from cf_model.context_probe import choose_pairs, follow_facts, list_errors
from cf_model.data.latents import Latents
from cf_model.data.video import write_video
from cf_model.device import choose_device
from cf_model.generation import VideoJob, generate_chunks, generate_windows, group_jobs, list_jobs
from cf_model.model import wan
from cf_model.model.denoiser import Denoiser
from cf_model.model.flow import BatchGenerator
from cf_model.model.rollout import RolloutSpec
from cf_model.text.encoder import TextEncoder
from tasks.files.json_lines import dump_json_lines
from tasks.params.schema import CAUSAL, Params, System
from tasks.parts.systems import as_trained
from tasks.parts.text_encoder import open_text_encoder
from tasks.runner.track import Track

DECODED = 12  # latent frames that are decoded at once: few enough for any memory, and faster than a chunk at a time
STUDENTS = ("stage1", "stage2")


def run(
    params: Params,
    track: Track,
    *,
    codec: Path,
    latents: Path,
    base: Path,
    teacher: Path,
    causal_init: Path,
    stage1: Path,
    stage2: Path,
    out: Path,
) -> dict[str, float]:
    """Write samples: a video of every system for each held-out caption or prompt of a file, and continuations of real prefixes."""
    weights = {"base": base, "teacher": teacher, "causal_init": causal_init, "stage1": stage1, "stage2": stage2}
    clips, pictures, text = Latents(latents), load_codec(codec).to(choose_device()), open_text_encoder(params.text).to(choose_device())
    todo = list(list_jobs(params.generate, clips))
    finished = track.work / "samples"  # a run that was killed is continued with the batches of which a video is missing here
    bar = track.progress(len(todo), "video")
    models: dict[str, Denoiser] = {}
    for jobs in group_jobs(todo, params.generate.batch):
        if not all((finished / job.file).exists() for job in jobs):
            system = jobs[0].system
            if system and system.weights not in models:
                models = {system.weights: wan.load_transformer(weights[system.weights], params.compute).to(choose_device())}
            prompts, null = text.encode([job.prompt for job in jobs]).to(choose_device()), clips.null_text.to(choose_device())
            held: list[list[dict[str, Any]]] = [[] for _ in jobs]
            latents_of_all = torch.cat(list(generate_latents(params, jobs, models, prompts, null, held)), dim=1)
            for row, job in enumerate(jobs):
                (finished / job.file).parent.mkdir(parents=True, exist_ok=True)
                if held[row]:  # before the video, whose presence says that both are there
                    (finished / job.file).with_suffix(".json").write_text(json.dumps(held[row], separators=(",", ":")))
                # Decoded one video after the other, because pixels are many times the size of latents.
                video = pictures.decode_stream(latents_of_all[row : row + 1].split(DECODED, dim=1))
                frames = (frame for part in video for frame in part[0].numpy())
                write_video(finished / job.file, frames, fps=params.video.fps, crf=params.generate.crf)
        bar.update(len(jobs))
    bar.close()
    shutil.copytree(finished, out, dirs_exist_ok=True)
    (out / "index.jsonl").write_text(dump_json_lines(index_row(params, job) for job in todo))
    probe_recall(params, track, clips, weights, out / "recall.jsonl")
    probe_context(params, pictures, text, weights, out / "interventions.jsonl")
    return {"videos": float(len(todo))}


def probe_recall(params: Params, track: Track, clips: Latents, weights: dict[str, Path], out: Path) -> None:
    """Write the one-step errors of the students on held-out clips: recall.jsonl, a row for each clip, noise
    level and memory, with the errors by latent frame, row and column.
    """
    probe = params.generate.recall
    length = probe.start + probe.frames
    causal = list_students(params)
    rows = [row for row in clips.rows("heldout") if clips.frames(row) >= length][: probe.clips]
    if not rows or not causal:
        out.write_text("")
        return
    real, text = clips.window(rows, [0] * len(rows), length).to(choose_device()), clips.text(rows).to(choose_device())
    names = [clips.clips[row]["id"] for row in rows]
    bar = track.progress(len(causal), "probe")
    found = []
    for name, system in causal.items():
        student, memory = wan.load_transformer(weights[system.weights], params.compute).to(choose_device()), system.memory
        assert memory
        rng = BatchGenerator([(params.seed, row) for row in rows], real.device)
        asked: dict[str, Any] = {"chunk": params.stage2.rollout.chunk, "start": probe.start, "sigmas": probe.sigmas, "rng": rng}
        found += [{"system": name} | row for row in list_errors(student, real, text, memory, names, **asked)]
        bar.update()
    bar.close()
    out.write_text(dump_json_lines(found))


def list_students(params: Params) -> dict[str, System]:
    """Return the trained students among the systems that continue clips, but not those whose slow part stays empty: it has no worth."""
    named = {name: as_trained(params, system) for name, system in params.generate.continuations.items() if system.weights in STUDENTS}
    return {name: one for name, one in named.items() if one.memory and (one.memory.promote != "similarity" or one.memory.tau > -1)}


def probe_context(params: Params, codec: Codec, text: TextEncoder, weights: dict[str, Path], out: Path) -> None:
    """Write which of two worlds the students follow that go on from contexts which differ in one fact: interventions.jsonl, a row for
    each student and pair of worlds. Without rendered clips no fact is known, and there are no rows.
    """
    probe, video, found = params.generate.interventions, params.video.model_dump(), list[dict[str, Any]]()
    ends: dict[str, Any] = {"start": probe.start, "stop": probe.start + probe.frames}
    place = ends | {"sink": params.stage2.memory.sink, "seed": params.seed, "fps": params.video.fps}
    pairs = choose_pairs(probe.lags, probe.pairs, params.clips.worlds, **place) if params.clips.source == "worlds" else []
    for name, system in list_students(params).items() if pairs else ():
        student, rollout = wan.load_transformer(weights[system.weights], params.compute).to(choose_device()), choose_rollout(params, system)
        assert system.memory
        how: dict[str, Any] = {"chunk": rollout.chunk, "sigmas": params.flow.shift_levels(rollout.levels), "seed": params.seed}
        how |= ends | {"batch": params.generate.batch, "video": video, "device": choose_device()}
        found += [{"system": name} | row for row in follow_facts(student, system.memory, pairs, codec, text, **how)]
    out.write_text(dump_json_lines(found))


def choose_rollout(params: Params, system: System) -> RolloutSpec:
    """Return the chunks and levels that a causal system generates with; causal_init has none of its own: it is trained at all levels."""
    return params.stage2.rollout if system.weights == "stage2" else params.stage1.rollout


def index_row(params: Params, job: VideoJob) -> dict[str, Any]:
    """Return a video's row of index.jsonl."""
    prefix = 0 if job.suite == "prompts" else video_frames(params.generate.prefix)
    about = {"suite": job.suite, "system": job.name, "prompt": job.prompt, "clip": job.clip, "seed": job.seed, "file": job.file}
    return about | {"prefix_frames": prefix, "chunk": count_made_at_once(params, job.system) if job.system else None}


def count_made_at_once(params: Params, system: System) -> int:
    """Return the latent frames that a system makes at once: a student's chunk, or a bidirectional model's window."""
    if system.weights in CAUSAL:
        return choose_rollout(params, system).chunk
    return params.base.window if system.weights == "base" else params.teacher.target


def generate_latents(
    params: Params,
    jobs: Sequence[VideoJob],
    models: dict[str, Denoiser],
    text: Float[Tensor, "B T E"],
    null: Float[Tensor, "T E"],
    held: Sequence[list[dict[str, Any]]] = (),
) -> Iterator[Float[Tensor, "B _ C H W"]]:
    """Yield the latents of videos of one system, chunk by chunk or window by window, after their real prefixes.

    Add to `held`, of each video, what a causal system's memory held when it began each chunk.
    """
    real = None if jobs[0].real is None else torch.cat([job.real for job in jobs if job.real is not None]).to(text.device)
    if real is not None:
        yield real
    if jobs[0].system is None:
        return
    system, model = as_trained(params, jobs[0].system), models[jobs[0].system.weights]
    size = model.transformer.config.in_channels, params.video.height // SPACE, params.video.width // SPACE
    # the noise depends on seed and prompt alone, so that systems can be compared pair by pair
    rng = BatchGenerator([(job.seed, job.number) for job in jobs], text.device)
    shared: dict[str, Any] = {"frames": system.frames, "size": size, "rng": rng, "real": real}
    if system.memory:
        rollout = choose_rollout(params, system)
        sigmas, merged = params.flow.shift_levels(rollout.levels), params.compute.merged
        yield from generate_chunks(model, text, system.memory, sigmas=sigmas, chunk=rollout.chunk, merged=merged, **shared, held=held)
    elif system.view:
        sampler = params.generate.model_dump(include={"guidance", "guidance_passes"})
        sampler |= {"flow": params.flow, "steps": params.generate.sampler_steps, "length": count_made_at_once(params, system)}
        yield from generate_windows(model, text, null, system.view, **sampler, **shared)
