"""Small random models and inputs for the tests of the mathematics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cf_model.data.latent_writer import write_latents
from cf_model.model import checkpoint, wan
from cf_model.model.denoiser import Denoiser
from cf_model.model.flow import Flow
from cf_model.model.memory import Memory, MemorySpec
from cf_model.model.rollout import RolloutSpec
from cf_model.model.sizes import ModelSpec

SHAPE = (4, 4, 4)  # C, H, W: four tokens a frame
FLOW = Flow(shift=5.0, sigma_min=0.02, sigma_max=0.98)


def spec(**changes: object) -> MemorySpec:
    values = {"sink": 3, "slow": 12, "fast": 6, "promote": "similarity", "tau": 0.95, "interval": 2, "begin": 1, "keep": "first"}
    values |= {"when": "evict", "timing": "clean", "fill": "none", "scope": "global", "positions": "anchored", "commit": "all"}
    values |= {"similarity": "raw"}
    return MemorySpec(**(values | changes))  # type: ignore[arg-type]


def rolling(**changes: object) -> RolloutSpec:
    values = {"chunk": 3, "levels": (1.0, 0.75, 0.5, 0.25), "window": 9, "place": "last", "renoise": "none", "exit": "shared"}
    values |= {"full_denoise": "all", "full_first": changes.get("skip_first", 0), "skip_first": 0, "persist": "fresh", "begin": "own"}
    values |= {"cache_noise": 0.0}
    return RolloutSpec(**(values | changes))  # type: ignore[arg-type]


def write_clips(
    folder: Path,
    clips: Iterable[tuple[dict[str, str], Tensor]],
    text: Callable[[list[str]], Tensor],
    *,
    shard_mib: float = 1.0,
    dtype: torch.dtype = torch.float32,
    negative: str = "",
) -> None:
    """Latents that no codec made, as the stage encode writes them."""
    made = {about["id"]: (about, latents) for about, latents in clips}
    settings: dict[str, Any] = {"shard_mib": shard_mib, "dtype": dtype, "fps": 16.0, "negative": negative}
    abouts = [about for about, _ in made.values()]
    write_latents(folder, abouts, lambda about: (made[about["id"]][1], {"md5": f"md5 of {about['id']}"}), text, **settings)


def denoiser(seed: int = 0, layers: int = 2, positions: int = 256, head_dim: int = 12) -> Denoiser:
    """A head that is not 0, so that something comes out. With a `head_dim` of 32 passes in float32 take the plain block's way."""
    sizes = ModelSpec(layers=layers, heads=2, head_dim=head_dim, ffn=32, freq=16, positions=positions)
    model = wan.build_transformer(sizes, channels=SHAPE[0], text_channels=8, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.3, generator=rng)
    return model.eval()


def places(memory: Memory, frames: int, layer: int = 0) -> list[int]:
    """The positions of what the first video remembers, without its empty places."""
    mask, positions = memory.mask_empty(layer), torch.as_tensor(memory.key_positions(frames, layer))
    positions = positions if positions.ndim == 1 else positions[0]
    return (positions if mask is None else positions[mask[0]]).int().tolist()


def queries(memory: Memory, frames: int, layer: int = 0) -> list[int]:
    """The positions of the first video's next frames."""
    positions = torch.as_tensor(memory.query_positions(frames, layer))
    return (positions if positions.ndim == 1 else positions[0]).tolist()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def restored(folder: Path, state: Mapping[str, Any]) -> int:
    """As a training loop begins: the newest whole checkpoint is read; its step, or 0."""
    path, step = checkpoint.find_newest_checkpoint(folder)
    if path:
        checkpoint.load_checkpoint(path, state)
    return step
