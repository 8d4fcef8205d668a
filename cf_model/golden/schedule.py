"""Cases of `cf check-golden` that need no transformer: the noise schedule, and distribution matching between stub scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cf_model.model.flow import Flow, add_noise, expand_sigma, to_velocity, to_x0
from cf_model.model.memory import empty_memory
from cf_model.model.rollout import Rollout, TargetChunk
from cf_model.model.view import TeacherView, sample_window
from cf_model.train.distill import compute_generator_gradient, replay_window

from .vectors import BrokenVectors, GoldenVectors, build_peer_memory

SHIFT, LOWEST, HIGHEST = 5.0, 0.02, 0.98  # Self-Forcing's; a stored table may have another shift
GUIDANCE = 4.0  # the vectors say 3.0, because they count from the conditional score
PLAIN_VIEW = TeacherView("none", 0, 0, 0, 1, 3, "shared", "joint")


def read_flow(golden: GoldenVectors) -> Flow:
    """Return the flow with the shift that the stored table of levels was made with."""
    if "sched.sigmas" not in golden.arrays:
        return Flow(SHIFT, LOWEST, HIGHEST)
    table = golden.read_array("sched.sigmas", None)
    u, sigma = 1 - (len(table) // 2) / len(table), float(table[len(table) // 2])
    shift = sigma * (1 - u) / (u * (1 - sigma))
    if not shift > 0.999:
        raise BrokenVectors(f"array sched.sigmas of {golden.folder} has {sigma} in its middle, which no shift of 1 or more gives; copy it")
    return Flow(round(shift, 3), LOWEST, HIGHEST)


def look_up_rows(golden: GoldenVectors, t: Tensor) -> Tensor:
    """Return the row of the nearest timestep for each `t`, because the peers look σ up in a table of 1000; ours is exact."""
    if "sched.timesteps" in golden.arrays:
        table = golden.read_array("sched.timesteps", None)
    else:
        table = 1000 * torch.tensor(read_flow(golden).sampler_sigmas(1000)[:-1])
    return (table - t.reshape(-1, 1)).abs().argmin(dim=1)


@dataclass(frozen=True)
class TwoLevelFlow(Flow):
    """A flow whose sampler makes one step between two given levels."""

    ends: tuple[float, ...]

    def sampler_sigmas(self, steps: int) -> list[float]:
        return list(self.ends)


@dataclass(frozen=True, eq=False)
class ConstantModel:
    """A model that predicts the same velocity for every input."""

    value: Tensor

    def velocity(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        return self.value


def run_schedule(golden: GoldenVectors) -> Iterator[tuple[str, Tensor]]:
    """Yield names of stored arrays with our levels, weights, noisy samples, conversions and Euler steps."""
    flow = read_flow(golden)
    levels = flow.sampler_sigmas(len(golden.read_array("sched.sigmas", None)))  # 0 is the last
    table = torch.tensor(levels[:-1], dtype=torch.float64)
    yield "sched.sigmas", table
    yield "sched.timesteps", 1000 * table
    yield "sched.train_weights", flow.loss_weight(table)
    nominal = golden.read_array("sched.nominal_steps", None) / 1000
    yield "sched.warped_steps", 1000 * flow.warp(nominal)
    for name in golden.find_names(r"sched\.shift[\d.]+\.warped_steps"):
        shift = float(name.removeprefix("sched.shift").removesuffix(".warped_steps"))
        yield name, 1000 * Flow(shift, LOWEST, HIGHEST).warp(nominal)
    t = golden.read_array("sched.t", None)
    shape = golden.read_array("sched.x0", len(t), None, None, None).shape
    x_0, noise, x_t, velocity = (golden.read_array(f"sched.{name}", *shape) for name in ("x0", "noise", "xt", "flow"))
    sigma = table[look_up_rows(golden, t)].float()
    yield "sched.xt", add_noise(x_0, noise, sigma)
    yield "sched.x0_from_flow", to_x0(x_t, velocity, sigma)
    yield "sched.training_weight", flow.loss_weight(sigma)
    sigma = table[look_up_rows(golden, golden.read_array("sched.flow_from_x0.t", len(t)))].float()
    yield "sched.flow_from_x0", to_velocity(x_t, x_0, sigma)
    stepped = []
    for row, x, v in zip(look_up_rows(golden, golden.read_array("sched.euler_step.t", len(t))).tolist(), x_t, velocity, strict=True):
        x, v, none = x[None, None], v[None, None], torch.zeros(1, 1, 1)
        step = TwoLevelFlow(flow.shift, LOWEST, HIGHEST, tuple(levels[row : row + 2]))
        options = {"context": x[:, :0], "shape": tuple(x.shape[1:]), "view": PLAIN_VIEW, "null": none[0], "rng": iter([x])}
        stepped.append(sample_window(ConstantModel(v), none, flow=step, steps=1, guidance=1, guidance_passes="apart", **options)[0])
    yield "sched.euler_step", torch.cat(stepped)


@dataclass(frozen=True)
class StubScore:
    """A score whose x_0 is `x` x_t + `t` t / 1000 + `text` mean(text) + `more`."""

    x: float
    t: float
    text: float
    more: float = 0.0

    def velocity(self, x_t: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        return to_velocity(x_t, self.x * x_t + expand_sigma(self.t * sigma, x_t) + self.text * text.mean() + self.more, sigma)


FAKE, REAL = StubScore(0.70, -0.05, 0.10), StubScore(0.60, 0.08, 0.30)


def read_latent(golden: GoldenVectors) -> Tensor:
    """Read the student's latents [N, F, C, H, W]."""
    return golden.read_array("dmd.latent", None, None, None, None, None)


def read_texts(golden: GoldenVectors) -> tuple[Tensor, Tensor]:
    """Read the texts [N, L, D] and empty texts; D is of any width, because the stub scores look only at the mean."""
    cond = golden.read_array("dmd.cond", len(read_latent(golden)), None, None)
    return cond, golden.read_array("dmd.uncond", *cond.shape)


def read_level(golden: GoldenVectors, name: str) -> Tensor:
    """Read a number for each video, which the vectors repeat for every frame."""
    value = golden.read_array(name, *read_latent(golden).shape[:2])
    if not (value == value[:, :1]).all():
        raise BrokenVectors(f"array {name} of {golden.folder} differs between frames of one video; our losses draw one level a video")
    return value[:, 0]


def compute_scores(golden: GoldenVectors, x_t: Tensor, sigma: Tensor, fake: StubScore = FAKE) -> tuple[Tensor, Tensor, Tensor]:
    """Compute our generator gradient at given noisy frames: normalised, raw, and the mean size that is logged.

    Each video is scored by itself with the mean of all texts, because the vectors' stubs look at that mean.
    """
    flow, x = replace(read_flow(golden), sigma_min=0.0, sigma_max=1.0), read_latent(golden)  # these levels are clamped already
    text, null = (words.mean(dim=0) for words in read_texts(golden))
    noise = (x_t - (1 - expand_sigma(sigma, x)) * x) / expand_sigma(sigma, x)
    draws = zip(sigma / (flow.shift - (flow.shift - 1) * sigma), noise, strict=True)  # the level before its shift
    options: dict[str, Any] = {"real": REAL, "fake": fake, "view": PLAIN_VIEW, "flow": flow, "guidance": GUIDANCE, "null": null}
    options |= {"guidance_passes": "apart"}
    results = [
        compute_generator_gradient(one[None], text[None], context=one[None, :0], rng=iter([u[None], epsilon[None]]), **options)
        for one, (u, epsilon) in zip(x, draws, strict=True)
    ]
    gradient = torch.cat([one for one, _ in results])
    normaliser, size = (torch.tensor([values[name] for _, values in results]) for name in ("normaliser", "dm_gradient"))
    return gradient, gradient * expand_sigma(normaliser, gradient), size.mean()[None]


def list_losses(golden: GoldenVectors) -> list[str]:
    """List the losses of the folder: loss_a over all frames, loss_b from the second chunk on."""
    return list(dict.fromkeys(name.split(".")[1] for name in golden.find_names(r"dmd\.loss_\w+\..*")))


def draw_levels(golden: GoldenVectors) -> Iterator[tuple[str, Tensor]]:
    """Yield the noise levels of the losses: drawn, shifted, clamped."""
    for loss in list_losses(golden):
        index = read_level(golden, f"dmd.{loss}.t_index")
        sigma = read_flow(golden).sample_score_sigma(len(index), iter([index / 1000]))
        yield f"dmd.{loss}.t_used", 1000 * sigma[:, None].expand(read_latent(golden).shape[:2])


def compare_gradients(golden: GoldenVectors) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield names, our gradients and the stored ones: of the scores, with a guided critic, and through the student's replay."""
    x_t, sigma = golden.read_array("dmd.noisy", *read_latent(golden).shape), read_level(golden, "dmd.t") / 1000
    gradient, raw, size = compute_scores(golden, x_t, sigma)
    ours_by_name = {"grad_normalized": gradient, "grad_raw": raw, "grad_norm_log": size}
    for name in golden.find_names(r"dmd\.grad_fakecfg[\d.]+"):
        # our critic is never guided, so this stub adds the guidance itself
        cond, uncond = (words.mean() for words in read_texts(golden))
        guided = replace(FAKE, more=FAKE.text * float(name.split("fakecfg")[1]) * float(cond - uncond))
        ours_by_name[name.removeprefix("dmd.")] = compute_scores(golden, x_t, sigma, guided)[0]
    for name, ours in ours_by_name.items():
        yield f"dmd.{name}", ours, golden.read_array(f"dmd.{name}", *ours.shape)
    for loss in list_losses(golden):
        name, (count, _, ours) = f"dmd.{loss}.latent_grad", back_propagate(golden, loss)
        # Choice: times the numbers that the loss is a mean of, or a gradient of 1e-5 were within any tolerance
        yield name, count * ours, count * golden.read_array(name, *ours.shape)


def compute_losses(golden: GoldenVectors) -> Iterator[tuple[str, Tensor]]:
    """Yield the value of each loss: half the mean square of its gradient."""
    for loss in list_losses(golden):
        count, gradient, _ = back_propagate(golden, loss)
        yield f"dmd.{loss}.value", 0.5 * (gradient.double().square().sum() / count)[None]


def back_propagate(golden: GoldenVectors, loss: str) -> tuple[int, Tensor, Tensor]:
    """Send a loss back through the student's replay, for a student that returns its input.

    Returns the count of numbers that the loss is a mean of, the score's gradient and the gradient of the latents.
    """
    x, chunk = read_latent(golden), golden.chunk
    sigma = read_level(golden, f"dmd.{loss}.t_used") / 1000
    looked_up = torch.tensor(read_flow(golden).sampler_sigmas(1000))[look_up_rows(golden, 1000 * sigma)]
    gradient, _, _ = compute_scores(golden, add_noise(x, golden.read_array(f"dmd.{loss}.noise", *x.shape), looked_up), sigma)
    first = chunk if loss == "loss_b" else 0  # the frame from which on there is a loss
    gradient[:, :first] = 0
    with torch.enable_grad():
        x.requires_grad_()
        spec = build_peer_memory("causal_global", x.shape[1])
        targets = [TargetChunk(at, x[:, at : at + chunk], 1.0, empty_memory(spec), at >= first) for at in range(0, x.shape[1], chunk)]
        rollout = Rollout(x.detach(), slice(0, x.shape[1]), tuple(targets), (), empty_memory(spec), (), None)
        replay_window(lambda x_t, *_: x_t, rollout, gradient, torch.zeros(len(x), 1, 1))
    assert x.grad is not None
    return x[:, first:].numel(), gradient, x.grad
