"""This code's model, memory, schedule, losses and rollouts against what Self-Forcing's and LongLive's own code computed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch
import torch.nn.functional as functional
from torch import Tensor

from cf_model.foreign.weight_names import to_diffusers
from cf_model.model.denoiser import Denoiser
from cf_model.model.memory import Memory, empty_memory
from cf_model.model.rollout import stream
from cf_model.model.rope import apply_rope, read_rotations

from . import schedule
from .vectors import KEYMAP, GoldenVectors, build_peer_memory, read_object


@dataclass(frozen=True)
class Tolerance:
    """A bound: |ours - theirs| <= absolute + relative * |theirs|."""

    absolute: float
    relative: float

    def __str__(self) -> str:
        return f"{self.absolute:g} + {self.relative:g}|x|" if self.relative else f"{self.absolute:g}"


# what the README of the vectors recommends
EXACT = Tolerance(0, 0)
ROUNDING = Tolerance(1e-6, 1e-6)  # the same products and sums, fused in another way
OUTPUT = Tolerance(2e-5, 1e-4)
ROLLOUT = Tolerance(1e-4, 0)
# Choice: beside its rtol 1e-6 an absolute part, for numbers near 0 that are differences: the weights of the losses are a
# float32 bell minus its minimum, times five, which is right to 1e-6 at best
SCHEDULE = Tolerance(2e-6, 1e-6)
GRADIENT = Tolerance(1e-5, 1e-5)
LOSS = Tolerance(0, 1e-5)

Outputs = Iterator[tuple[str, Tensor]]  # the name of a stored array, and what our code computes from the inputs
Comparisons = Iterator[tuple[str, Tensor, Tensor]]  # a name, our array, the stored one
FAMILIES = ("text", "bi", "selfforcing", "diffusers", "causal", "mask", "sched", "dmd", "roll", "ll_abs", "ll_rel")


@dataclass(frozen=True)
class CaseResult:
    """What comparing a case's arrays found."""

    arrays: int  # how many were compared
    largest: float  # largest absolute difference of all numbers
    culprit: str  # the array furthest beyond the tolerance; empty when all are within it


@torch.no_grad()
def compare_case(tolerance: Tolerance, compared: Comparisons) -> CaseResult:
    """Compare a case's arrays with the stored ones; a number that is not finite differs by infinity."""
    arrays, largest, worst, culprit = 0, 0.0, 0.0, ""
    for name, ours, theirs in compared:
        ours, theirs = ours.double(), theirs.double()
        gap = (ours - theirs).abs().nan_to_num(nan=torch.inf)
        beyond = float((gap - tolerance.absolute - tolerance.relative * theirs.abs()).nan_to_num(nan=torch.inf).max())
        arrays, largest = arrays + 1, max(largest, float(gap.max()))
        if beyond > worst:
            worst, culprit = beyond, name
    return CaseResult(arrays, largest, culprit)


def list_cases(golden: GoldenVectors, model: Denoiser) -> Iterator[tuple[str, Tolerance, Comparisons]]:
    """Yield name, tolerance and comparisons of each case in the order of the vectors' README; arrays are computed as they are compared."""

    def with_stored(outputs: Outputs) -> Comparisons:
        return ((name, ours, golden.read_array(name, *ours.shape)) for name, ours in outputs)

    yield "keymap", EXACT, compare_keymap(golden)
    if golden.find_names(r"text\..*"):
        yield "text", EXACT, with_stored(pad_text(golden))
    if golden.find_names(r"bi\..*"):
        yield "bi", OUTPUT, with_stored(run_bidirectional(golden, model, ["bi.out"]))
        yield "bi, plain diffusers", ROUNDING, compare_plain_diffusers(golden, model)
    for family in ("selfforcing", "diffusers"):
        if names := golden.find_names(rf"{family}\.bi\d*\.out"):
            yield family, OUTPUT, with_stored(run_bidirectional(golden, model, names))
    for case in dict.fromkeys(name.split(".")[0] for name in golden.find_names(r"(causal|ll)_.*")):
        yield case, OUTPUT, with_stored(run_causal(golden, model, case))
    if golden.find_names(r"mask\..*"):
        yield "mask", OUTPUT, with_stored(run_masks(golden, model))
    if golden.find_names(r"sched\..*"):
        yield "sched", SCHEDULE, with_stored(schedule.run_schedule(golden))
    if golden.find_names(r"dmd\..*"):
        yield "dmd levels", SCHEDULE, with_stored(schedule.draw_levels(golden))
        yield "dmd gradients", GRADIENT, schedule.compare_gradients(golden)
        yield "dmd losses", LOSS, with_stored(schedule.compute_losses(golden))
    for name in golden.find_names(r"roll_.*"):
        yield name.split(".")[0], ROLLOUT, with_stored(run_rollout(golden, model, name))


def compare_keymap(golden: GoldenVectors) -> Comparisons:
    """Compare the converter's names with the folder's: 1 stands for a name that differs."""
    ours = {old: new for new, old in to_diffusers({name: name for name in golden.load_weights()}).items()}
    theirs = read_object(golden.find_file(KEYMAP))
    for name in sorted(ours.keys() | theirs.keys()):
        yield name, torch.tensor(float(ours.get(name) != theirs.get(name))), torch.tensor(0.0)


def pad_text(golden: GoldenVectors) -> Outputs:
    """Yield the texts with zeros past each prompt's end."""
    text = golden.read_array("text.padded", None, None, None)
    yield "text.padded", text * (torch.arange(text.shape[1]) < golden.read_array("text.lens", len(text))[:, None])[..., None]


def run_bidirectional(golden: GoldenVectors, model: Denoiser, names: list[str]) -> Outputs:
    """Yield the model's output without a memory, for arrays named like bi500.out with t = 500 for every video."""
    x = golden.read_video("bi.x", None)
    t = golden.read_array("bi.t", len(x))
    for name in names:
        level = re.search(r"bi(\d+)", name)
        sigma = (torch.full_like(t, float(level[1])) if level else t) / 1000
        yield name, model.velocity(x, sigma, golden.read_text(len(x))).transpose(1, 2)


def compare_plain_diffusers(golden: GoldenVectors, model: Denoiser) -> Comparisons:
    """Compare the model without a memory with diffusers' WanTransformer3DModel, which must agree to the bit."""
    x, ours = golden.read_video("bi.x", None), model.transformer
    t, text = golden.read_array("bi.t", len(x)), golden.read_text(len(x))
    untouched = type(ours).from_config(ours.config).eval()
    untouched.load_state_dict(ours.state_dict(), strict=True)
    theirs = untouched(x.transpose(1, 2), 1000 * (t / 1000), text, return_dict=False)[0]
    yield "the same weights in diffusers", model.velocity(x, t / 1000, text), theirs.transpose(1, 2)


def run_causal(golden: GoldenVectors, model: Denoiser, case: str) -> Outputs:
    """Yield for each chunk a noisy pass and a clean one over the same memory, and what is cached after the last chunk."""
    chunk, chunks = golden.chunk, max(golden.count_arrays(rf"{case}\.chunk(\d+)\..*"), 1)
    level = f"{case}.t_noisy"
    if case.startswith("ll_"):  # LongLive's passes are at Self-Forcing's level
        level = next(iter(golden.find_names(r"causal_(global|w\d+_s\d+)\.t_noisy")), "causal_global.t_noisy")
    spec, text = build_peer_memory(case, chunk * chunks), golden.read_text(1)
    sigma = golden.read_array(level, 1, chunk) / 1000
    memory = before = empty_memory(spec)
    for k in range(chunks):
        noisy, clean = (golden.read_video(f"causal.{kind}{k}", 1, chunk) for kind in ("noisy", "clean"))
        yield f"{case}.chunk{k}.noisy_out", model.velocity(noisy, sigma, text, memory).transpose(1, 2)
        yield f"{case}.chunk{k}.clean_out", model.velocity(clean, torch.zeros(1), text, memory).transpose(1, 2)
        before, memory = memory, model.remember(clean, text, memory)
    if cached := golden.find_names(rf"{case}\.cache\.layer\d+\.(v|k_roped|k_unroped)"):
        # a fast part that has room for the last chunk beside its past holds what the peers' caches do: the whole window
        window = model.remember(clean, text, replace(before, spec=replace(spec, fast=spec.fast + chunk)))
        yield from read_caches(golden, model, window, clean, cached)


def read_caches(golden: GoldenVectors, model: Denoiser, window: Memory, x: Tensor, names: list[str]) -> Outputs:
    """Yield cached values, and keys before rotation or at their absolute positions; a place that was never filled is zero."""
    frames = [index for part in window.frame_indices().values() for index in part]
    positions = read_rotations(model.transformer.rope.table, frames, x.transpose(1, 2))
    for name in names:
        _, _, layer, kind = name.split(".")
        keys, values = (torch.cat(part, dim=1) for part in window.past(int(layer.removeprefix("layer"))))
        ours = {"v": values, "k_unroped": keys, "k_roped": apply_rope(keys, positions)}[kind]
        places = golden.read_array(name, 1, None, *ours.shape[2:]).shape[1]
        yield name, functional.pad(ours, (0, 0, 0, 0, 0, max(places - ours.shape[1], 0)))


def run_masks(golden: GoldenVectors, model: Denoiser) -> Outputs:
    """Yield the outputs under the peers' training masks, computed chunk by chunk with a memory instead of a mask.

    A chunk sees the noisy frames before it, or the clean ones with teacher forcing.
    """
    noisy = golden.read_video("mask.noisy", 1)
    clean, t = golden.read_video("mask.clean", 1, noisy.shape[1]), golden.read_array("mask.t", 1, noisy.shape[1])
    text, chunk, sigma = golden.read_text(1), golden.chunk, t / 1000
    for name, past, level in (("blockwise_causal_out", noisy, sigma), ("teacher_forcing_out", clean, torch.zeros_like(sigma))):
        memory, outputs = empty_memory(build_peer_memory("causal_global", noisy.shape[1])), []
        for x, s, remembered, at in zip(*(video.split(chunk, dim=1) for video in (noisy, sigma, past, level)), strict=True):
            outputs.append(model.velocity(x, s, text, memory))
            memory = model.remember(remembered, text, memory, sigma=at)
        yield f"mask.{name}", torch.cat(outputs, dim=1).transpose(1, 2)


def run_rollout(golden: GoldenVectors, model: Denoiser, name: str) -> Outputs:
    """Yield the latents of inference's rollout, with the noise that the peer drew."""
    noise = golden.read_array("roll.noise", 1, None, golden.read_size("in_dim"), None, None)
    sigmas = (golden.read_array("roll.denoising_steps", None) / 1000).tolist()
    (frames, *shape), chunk, again = noise.shape[1:], golden.chunk, len(sigmas) - 1

    def noises() -> Iterator[Tensor]:
        for k, start in enumerate(noise.split(chunk, dim=1)):
            yield start
            for step in range(again):
                yield golden.read_array(f"roll.renoise{k * again + step}", chunk, *shape)[None]

    memory = empty_memory(build_peer_memory(name.split(".")[0], frames))
    chunks = stream(model, golden.read_text(1), (shape[0], shape[1], shape[2]), sigmas=sigmas, chunk=chunk, memory=memory, rng=noises())
    yield name, torch.cat(list(islice(chunks, frames // chunk)), dim=1)
