"""Folders of golden vectors that no code of ours made, at sizes of the test's choice, and wrong ones on purpose."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from cf_model.foreign.weight_names import to_diffusers
from tests.wan_reference import Wan, weights

CONFIG = {
    **{"seed": 5, "dim": 48, "num_heads": 4, "ffn_dim": 80, "num_layers": 2, "text_len": 7, "text_dim": 10, "freq_dim": 16},
    **{"in_dim": 4, "out_dim": 4, "patch_size": [1, 2, 2], "H": 4, "W": 6},
}
CHUNK, CHUNKS, SHIFT = 2, 5, 3.0


@dataclass(frozen=True)
class Setting:
    """Which past frames a chunk sees and where; the last two are what a wrong implementation would do."""

    window: int
    sink: int
    relative: bool = False
    late: int = 0  # the last chunk sits so many frames too late
    no_sink: bool = False

    def past(self, first: int) -> list[int]:
        newest = range(max(0, first + CHUNK - (self.window - self.sink)), first)
        return [f for f in range(first) if (f < self.sink and not self.no_sink) or f in newest]

    def tables(self, frames: int) -> tuple[Tensor, Tensor]:
        sees, times = torch.zeros(frames, frames, dtype=torch.bool), torch.zeros(frames, frames, dtype=torch.long)
        for first in range(0, frames, CHUNK):
            own = range(first, first + CHUNK)
            seen = [*self.past(first), *own]
            late = self.late if first + CHUNK == frames else 0
            for f in own:
                sees[f, seen] = True
                for place, other in enumerate(seen):
                    times[f, other] = (place if self.relative else other) + late * (other in own)
        return sees, times


def beside(sees: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Tables for a clean video with a noisy one after it: a noisy chunk sees the clean past and itself."""
    frames = len(sees)
    own = torch.arange(frames) // CHUNK
    own = own[:, None] == own[None]
    seen = torch.cat([torch.cat([sees, own & False], 1), torch.cat([sees & ~own, sees & own], 1)])
    return seen, torch.cat([torch.cat([times, times], 1)] * 2)


@dataclass
class Writer:
    """A folder of vectors. Arrays are stored as the peers have them: [B, C, F, H, W] where a model made them."""

    c: dict
    settings: dict[str, Setting]

    def __post_init__(self) -> None:
        self.rng = torch.Generator().manual_seed(self.c["seed"])
        self.wan = Wan(self.c, weights(self.c))
        self.arrays: dict[str, Tensor] = {}

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.rng)

    def frames(self, n: int) -> Tensor:
        return self.normal(n, self.c["in_dim"], self.c["H"], self.c["W"])

    def model_cases(self) -> None:
        a, everything = self.arrays, Setting(window=99, sink=0)
        lengths = torch.tensor([5, 3])
        a["text.lens"] = lengths
        self.text = a["text.padded"] = self.normal(2, 7, 10) * (torch.arange(7) < lengths[:, None])[..., None]
        x, t, n = self.frames(8).view(2, 4, *self.frames(1).shape[1:]), torch.tensor([812.5, 77.0]), 4
        whole, steady = torch.ones(n, n, dtype=torch.bool), torch.arange(n).expand(n, n)
        a |= {"bi.x": x.transpose(1, 2), "bi.t": t}
        for name, at in (("bi.out", t), ("diffusers.bi250.out", torch.full_like(t, 250))):
            made = [self.wan(x[i], at[i].expand(n), self.text[i], whole, steady)[0] for i in range(2)]
            a[name] = torch.stack(made).transpose(1, 2)
        self.clean, self.noisy = self.frames(CHUNK * CHUNKS), self.frames(CHUNK * CHUNKS)
        for kind in ("clean", "noisy"):
            a |= {f"causal.{kind}{k}": part.transpose(0, 1)[None] for k, part in enumerate(getattr(self, kind).split(CHUNK))}
        for case, setting in self.settings.items():
            self.causal(case, setting)
        t = torch.tensor([999.0, 640.0, 640.0, 250.0, 11.0]).repeat_interleave(CHUNK)
        sees, times = everything.tables(CHUNK * CHUNKS)
        a |= {"mask.noisy": self.noisy.transpose(0, 1)[None], "mask.clean": self.clean.transpose(0, 1)[None], "mask.t": t[None]}
        a["mask.blockwise_causal_out"] = self.wan(self.noisy, t, self.text[0], sees, times)[0].transpose(0, 1)[None]
        made = self.beside(self.clean, self.noisy, t, everything)[0][CHUNK * CHUNKS :]
        a["mask.teacher_forcing_out"] = made.transpose(0, 1)[None]

    def beside(self, clean: Tensor, noisy: Tensor, t: Tensor, setting: Setting) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """One pass over a clean video and the noisy one beside it; less of it is seen where noisy ends early."""
        tables = beside(*setting.tables(len(clean)))
        return self.wan(torch.cat([clean, noisy]), torch.cat([torch.zeros(len(clean)), t]), self.text[0], *tables)

    def causal(self, case: str, setting: Setting) -> None:
        t = torch.tensor([900.0, 30.0] if case.endswith("per_frame_t") else [700.0, 700.0])
        if case.startswith("causal"):
            self.arrays[f"{case}.t_noisy"] = t[None]
        made, cached = self.beside(self.clean, self.noisy, t.repeat(CHUNKS), setting)
        frames = CHUNK * CHUNKS
        for kind, part in (("clean", made[:frames]), ("noisy", made[frames:])):
            for k, out in enumerate(part.split(CHUNK)):
                self.arrays[f"{case}.chunk{k}.{kind}_out"] = out.transpose(0, 1)[None]
        held = [*setting.past(frames - CHUNK), *range(frames - CHUNK, frames)]
        keys, values = cached[-1][0][held], cached[-1][1][held]
        kind = "k_unroped" if setting.relative else "k_roped"
        keys = keys if setting.relative else self.wan.rope(keys, torch.tensor(held))
        self.arrays |= {f"{case}.cache.layer1.{kind}": keys.flatten(0, 1)[None], f"{case}.cache.layer1.v": values.flatten(0, 1)[None]}

    def rollout(self, case: str, setting: Setting) -> None:
        a, steps, video = self.arrays, [1000.0, 900.0, 500.0], self.frames(0)
        if "roll.noise" not in a:
            a |= {"roll.noise": self.frames(3 * CHUNK)[None], "roll.denoising_steps": torch.tensor(steps)}
            a |= {f"roll.renoise{i}": self.frames(CHUNK) for i in range(3 * 2)}
        for k, x in enumerate(a["roll.noise"][0].split(CHUNK)):
            for step, t in enumerate(steps):
                if step:
                    x = (1 - t / 1000) * made + t / 1000 * a[f"roll.renoise{2 * k + step - 1}"]
                clean = torch.cat([video, torch.zeros_like(x)])  # of the current chunk nothing clean is seen
                noisy = torch.cat([torch.zeros_like(video), x])
                made = x - t / 1000 * self.beside(clean, noisy, torch.full((len(clean),), t), setting)[0][-CHUNK:]
            video = torch.cat([video, made])
        a[f"{case}.latents"] = video[None]

    def schedule(self) -> None:
        u = 1 - torch.arange(1000).double() / 1000
        sigmas = SHIFT * u / (1 + (SHIFT - 1) * u)
        bell = torch.exp(-2 * (sigmas - 0.5) ** 2)
        weight = (bell - bell.min()) / (bell - bell.min()).mean()
        x, noise, velocity, row = self.frames(3), self.frames(3), self.frames(3), torch.tensor([0, 400, 997])
        s, below = sigmas[row].view(-1, 1, 1, 1), sigmas[row + 1].view(-1, 1, 1, 1)
        xt, t = ((1 - s) * x + s * noise).float(), 1000 * sigmas[row]
        made = {"sigmas": sigmas, "timesteps": 1000 * sigmas, "train_weights": weight, "nominal_steps": torch.tensor([1000, 500]), "t": t}
        made |= {"warped_steps": torch.tensor([1000.0, 750.0]), "shift8.warped_steps": torch.tensor([1000.0, 8000 / 9])}
        made |= {"x0": x, "noise": noise, "xt": xt, "flow": velocity, "x0_from_flow": xt - s * velocity}
        made |= {"flow_from_x0": (xt - x) / s, "flow_from_x0.t": t}
        made |= {"euler_step": xt + (below - s) * velocity, "euler_step.t": t.double(), "training_weight": weight[row]}
        self.arrays |= {f"sched.{name}": value for name, value in made.items()}

    def distribution_matching(self) -> None:
        """The losses as the README writes them, and their gradients by autograd."""
        x, noisy, level = self.frames(8).view(2, 4, *self.frames(1).shape[1:]), self.frames(8).view(2, 4, *self.frames(1).shape[1:]), (2, 4)
        cond, uncond = self.normal(2, 7, 10), self.normal(2, 7, 10)

        def gradient(x_t: Tensor, t: Tensor, fake_guidance: float = 0.0) -> tuple[Tensor, Tensor]:
            def fake(c: Tensor) -> Tensor:
                return 0.70 * x_t - 0.05 * t / 1000 + 0.10 * c.double().mean()

            def real(c: Tensor) -> Tensor:
                return 0.60 * x_t + 0.08 * t / 1000 + 0.30 * c.double().mean()

            guided = real(cond) + 3.0 * (real(cond) - real(uncond))
            raw = fake(cond) + fake_guidance * (fake(cond) - fake(uncond)) - guided
            return raw, raw / (x - guided).abs().mean(dim=(1, 2, 3, 4), keepdim=True)

        t = torch.tensor([310.0, 640.0]).view(2, 1, 1, 1, 1)
        raw, normal = gradient(noisy.double(), t)
        made = {"latent": x, "cond": cond, "uncond": uncond, "noisy": noisy, "t": t.view(2, 1).expand(level), "grad_raw": raw}
        made |= {"grad_normalized": normal, "grad_norm_log": normal.abs().mean()[None]}
        made["grad_fakecfg0.5"] = gradient(noisy.double(), t, 0.5)[1]
        for loss, index, masked in (("loss_a", [137, 620], 0), ("loss_b", [998, 2], CHUNK)):
            u = torch.tensor(index).double() / 1000
            used = (1000 * SHIFT * u / (1 + (SHIFT - 1) * u)).clamp(20, 980)
            row = (self.arrays["sched.timesteps"] - used[:, None]).abs().argmin(dim=1)
            s, noise = self.arrays["sched.sigmas"][row].view(2, 1, 1, 1, 1), self.frames(8).view_as(x)
            leaf = x.double().requires_grad_()
            step = gradient((1 - s) * x + s * noise, used.view(2, 1, 1, 1, 1))[1]
            value = 0.5 * (leaf - (leaf - step).detach())[:, masked:].square().mean()
            value.backward()
            made |= {f"{loss}.t_index": torch.tensor(index)[:, None].expand(level), f"{loss}.t_used": used[:, None].expand(level)}
            made |= {f"{loss}.noise": noise, f"{loss}.value": value.detach()[None], f"{loss}.latent_grad": leaf.grad}
        self.arrays |= {f"dmd.{name}": value for name, value in made.items()}

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.wan.w, folder / "weights_selfforcing_keys.safetensors")
        names = {old: new for new, old in to_diffusers({name: name for name in self.wan.w}).items()}
        (folder / "keymap_selfforcing_to_diffusers.json").write_text(json.dumps(names))
        (folder / "meta_selfforcing.json").write_text(json.dumps({"config": self.c}))
        single = {name: value.numpy() if value.dtype == torch.int64 else value.float().numpy() for name, value in self.arrays.items()}
        for file, pattern in (("longlive_rel", True), ("selfforcing", False)):
            np.savez(folder / f"{file}.npz", **{name: value for name, value in single.items() if name.startswith("ll_") == pattern})
