"""Wan once more, in plain float64, under Self-Forcing's names and without a cache: what golden vectors can be made with.

All frames of all passes stand side by side in one sequence, and two tables say for every frame which others it sees and
where time places them for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]  # by name


def shapes(c: dict) -> dict[str, tuple[int, ...]]:
    d, ffn = c["dim"], c["ffn_dim"]
    linear = {"text_embedding.0": (d, c["text_dim"]), "text_embedding.2": (d, d), "time_embedding.0": (d, c["freq_dim"])}
    linear |= {"time_embedding.2": (d, d), "time_projection.1": (6 * d, d), "head.head": (4 * c["out_dim"], d)}
    linear |= {"patch_embedding": (d, c["in_dim"], 1, 2, 2)}
    rest = {"head.modulation": (1, 2, d)}
    for n in range(c["num_layers"]):
        for attention in ("self_attn", "cross_attn"):
            linear |= {f"blocks.{n}.{attention}.{one}": (d, d) for one in "qkvo"}
            rest |= {f"blocks.{n}.{attention}.norm_{one}.weight": (d,) for one in "qk"}
        linear |= {f"blocks.{n}.ffn.0": (ffn, d), f"blocks.{n}.ffn.2": (d, ffn)}
        rest |= {f"blocks.{n}.norm3.weight": (d,), f"blocks.{n}.norm3.bias": (d,), f"blocks.{n}.modulation": (1, 6, d)}
    rest |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    return rest | {f"{name}.weight": shape for name, shape in linear.items()}


def weights(c: dict) -> Weights:
    """By the rule of the vectors' README."""
    rng, made = np.random.default_rng(c["seed"]), {}
    for name, shape in sorted(shapes(c).items()):
        a = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
        about_one = name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight"))
        scale = 0.5 if name.endswith("modulation") else 0.05 if name.endswith("bias") else 0.08
        made[name] = 1 + 0.1 * a if about_one else scale * a
    return made


@dataclass
class Wan:
    c: dict
    w: Weights

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"].double().flatten(1), self.w[f"{name}.bias"].double())

    def mlp(self, name: str, x: Tensor, act: str) -> Tensor:
        x = self.linear(f"{name}.0", x)
        return self.linear(f"{name}.2", F.silu(x) if act == "silu" else F.gelu(x, approximate="tanh"))

    def heads(self, name: str, one: str, x: Tensor) -> Tensor:
        """[..., heads, head_dim], q and k normalised over all heads together."""
        x = self.linear(f"{name}.{one}", x)
        if one != "v":
            x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.w[f"{name}.norm_{one}.weight"].double()
        return x.unflatten(-1, (self.c["num_heads"], -1))

    def rope(self, x: Tensor, times: Tensor) -> Tensor:
        """x: [frames, rows * columns, heads, head_dim] at the given times, as complex pairs."""
        rows, columns, d = self.c["H"] // 2, self.c["W"] // 2, x.shape[-1]
        side = 2 * (d // 6)
        angles = []
        for places, size in ((times, d - 2 * side), (torch.arange(rows), side), (torch.arange(columns), side)):
            angles.append(places[:, None].double() * 10000 ** (-torch.arange(0, size, 2).double() / size))
        t, h, w = angles
        grid = (len(times), rows, columns, -1)
        angle = torch.cat([t[:, None, None].expand(*grid), h[None, :, None].expand(*grid), w[None, None].expand(*grid)], dim=-1)
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.exp(1j * angle.flatten(1, 2))[:, :, None]
        return torch.view_as_real(turned).flatten(-2)

    def __call__(self, x: Tensor, t: Tensor, text: Tensor, sees: Tensor, times: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """x [frames, C, H, W]; sees, times [frames, frames]: of the column's frame for the row's. Also each layer's raw k and v."""
        c, cached = self.c, []
        frames, rows, columns = len(x), c["H"] // 2, c["W"] // 2
        patches = x.double().unflatten(2, (rows, 2)).unflatten(4, (columns, 2)).permute(0, 2, 4, 1, 3, 5)
        x = self.linear("patch_embedding", patches.reshape(frames, rows * columns, -1))
        words = self.mlp("text_embedding", text.double(), "gelu")
        angle = t.double()[:, None] * 10000 ** (-torch.arange(c["freq_dim"] // 2).double() / (c["freq_dim"] // 2))
        e = self.mlp("time_embedding", torch.cat([angle.cos(), angle.sin()], dim=-1), "silu")
        e6 = self.linear("time_projection.1", F.silu(e)).unflatten(1, (6, -1))
        for n in range(c["num_layers"]):
            name = f"blocks.{n}"
            shift, scale, gate, shift_f, scale_f, gate_f = (e6 + self.w[f"{name}.modulation"].double()).unsqueeze(2).unbind(1)
            y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
            q, k, v = (self.heads(f"{name}.self_attn", one, y) for one in "qkv")
            cached.append((k, v))
            out = []
            for f in range(frames):
                seen = sees[f].nonzero().flatten()
                keys, query = self.rope(k[seen], times[f, seen]).flatten(0, 1), self.rope(q[f : f + 1], times[f, f : f + 1])[0]
                out.append(self.attend(query, keys, v[seen].flatten(0, 1)))
            x = x + gate * self.linear(f"{name}.self_attn.o", torch.stack(out))
            y = F.layer_norm(x, x.shape[-1:], self.w[f"{name}.norm3.weight"].double(), self.w[f"{name}.norm3.bias"].double(), eps=1e-6)
            q, (k, v) = self.heads(f"{name}.cross_attn", "q", y), (self.heads(f"{name}.cross_attn", one, words) for one in "kv")
            out = torch.stack([self.attend(one, k, v) for one in q])
            x = x + self.linear(f"{name}.cross_attn.o", out)
            y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale_f) + shift_f
            x = x + gate_f * self.mlp(f"{name}.ffn", y, "gelu")
        shift, scale = (e[:, None] + self.w["head.modulation"].double()).unsqueeze(2).unbind(1)
        x = self.linear("head.head", F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        x = x.view(frames, rows, columns, 2, 2, -1).permute(0, 5, 1, 3, 2, 4).reshape(frames, -1, c["H"], c["W"])
        return x, cached

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("qnd,knd->nqk", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("nqk,knd->qnd", scores.softmax(-1), v).flatten(1)
