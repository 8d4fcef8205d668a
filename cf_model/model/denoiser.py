"""G_φ, s_real and s_fake of alg. 1: a diffusers Wan transformer that can look at a memory. All three are this class.

diffusers' model file is used as it is, because two of its seams are enough: the attention processor, and the `rope`
submodule, whose output every block hands to its self-attention untouched. So `rope` hands over the memory as well.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call

from .attention import MemoryAttention, MemoryRope
from .context import fixed_memory
from .flow import to_x0
from .key_values import Frames, LayerKeyValues, split_frames
from .memory import Memory, MemorySpec, empty_memory
from .precision import WeightCopies, prepare_layers
from .store import read_filled

Attention = Literal["native", "cudnn", "flash2", "flash3"]
Precision = Literal["float32", "bfloat16"]


# params.yaml's names of attention kernels: diffusers' names, and the package that each needs
BACKENDS = {
    "native": ("native", None),
    "cudnn": ("_native_cudnn", None),
    "flash2": ("flash", "flash_attn"),
    "flash3": ("_flash_3", "flash_attn_interface"),
}
WITHOUT_MASK = ("flash2", "flash3")  # kernels that attend to all keys or to none


@dataclass(frozen=True)
class Compute:
    """How a model computes: kernel, precision, and what is stored for the backward pass. Results differ by rounding alone."""

    attention: Attention  # of the self-attention, by diffusers' dispatcher
    dtype: Precision  # of the products; weights, norms and sums stay in float32
    checkpointing: bool  # compute a block's activations again in the backward pass instead of storing them
    compiled: bool  # passes without gradient by torch.compile, part by part of a block; a minute of compiling, once for all blocks

    def __post_init__(self) -> None:
        # flash and cuDNN kernels exist for half precision only
        if self.attention != "native" and self.dtype == "float32":
            problem = f"attention is {self.attention}, which computes in bfloat16, but dtype is {self.dtype}"
            raise ValueError(f"{problem}; use dtype: bfloat16, or attention: native")


EXACT = Compute(attention="native", dtype="float32", checkpointing=False, compiled=False)


class Denoiser(nn.Module):
    """Predictor of x_0 from x_σ, the prompt and the remembered frames.

    Its state_dict has diffusers' keys under `transformer.`, so weights go to and fro unchanged.
    """

    def __init__(self, transformer: Any, compute: Compute = EXACT) -> None:
        super().__init__()
        from .block import prepare_blocks  # here, so that reading params needs no diffusers

        backend, package = BACKENDS[compute.attention]
        if package and importlib.util.find_spec(package) is None:
            raise ValueError(f"attention is {compute.attention}, but the package {package} is not installed; install it, or use native")
        if compute.attention != "native" and not torch.cuda.is_available():
            raise ValueError(f"attention is {compute.attention}, which needs a GPU, and there is none; use native")
        # the two seams: positions and memory by way of `rope`, attention by its processor
        transformer.rope = MemoryRope(transformer.rope)
        transformer.rope.takes_mask = compute.attention not in WITHOUT_MASK
        for layer, block in enumerate(transformer.blocks):
            block.attn1.set_processor(MemoryAttention(layer, backend))
        prompts = prepare_blocks(transformer, compiled=compute.compiled)
        prepare_layers(transformer, checkpointing=compute.checkpointing)
        self.transformer: Any = transformer  # diffusers' WanTransformer3DModel, which this file doesn't import
        self.compute, self.copies = compute, WeightCopies(transformer, prompts, wanted=compute.dtype == "bfloat16")

    def freeze(self) -> Denoiser:
        """Let nothing train this model any more, and keep the weights of its products in the width that they are used in."""
        self.requires_grad_(False)
        self.copies.narrow_originals()
        return self

    def load_state_dict(self, *given: Any, **named: Any) -> Any:
        self.copies.forget()
        return super().load_state_dict(*given, **named)

    def _apply(self, *given: Any, **named: Any) -> Any:
        self.copies.forget()  # the weights move to another device or type
        return super()._apply(*given, **named)

    def forward(
        self,
        x_t: Float[Tensor, "B F C H W"],
        sigma: Float[Tensor, " B"],
        text: Float[Tensor, "B T E"],
        memory: Memory | None = None,
    ) -> Float[Tensor, "B F C H W"]:
        """Return x_0 = x_σ - σ v of a chunk or window that sees `memory`."""
        return to_x0(x_t, self.velocity(x_t, sigma, text, memory), sigma)

    def velocity(
        self,
        x_t: Float[Tensor, "B F C H W"],
        sigma: Float[Tensor, " B"] | Float[Tensor, "B F"],
        text: Float[Tensor, "B T E"],
        memory: Memory | None = None,
        filled: Bool[Tensor, "B F"] | None = None,
    ) -> Float[Tensor, "B F C H W"]:
        """Return v = ε - x_0. `sigma` is a level for each sample or for each frame; without `memory` the pass is plain Wan.

        `filled` says which frames of such a pass a video has; v of the others means nothing.
        """
        if filled is not None and not self.transformer.rope.takes_mask:
            left = read_filled(filled)  # the pass is over these frames alone
            velocity = self._run_transformer(x_t[:, left], sigma[:, left] if sigma.ndim == 2 else sigma, text, memory, None)
            return torch.zeros_like(x_t).index_copy(1, left, velocity)
        return self._run_transformer(x_t, sigma, text, memory, None, filled)

    def remember(
        self,
        x_0: Float[Tensor, "B F C H W"],
        text: Float[Tensor, "B T E"],
        memory: Memory,
        *,
        sigma: Float[Tensor, " B"] | Float[Tensor, "B F"] | None = None,
        grad: bool = False,
        disturb: Callable[[Frames], Frames] | None = None,
    ) -> Memory:
        """Return the memory after a chunk, by one pass over it for its keys and values (alg. 1, line 21).

        The pass is clean, or at a level `sigma` (Self-Forcing's context noise), and has no graph unless `grad`. `disturb` changes
        the keys and values before they are remembered (`cache_noise`).
        """
        frames, level = x_0.shape[1], x_0.new_zeros(len(x_0)) if sigma is None else sigma
        captured: LayerKeyValues = {}
        seen = memory.commit_context(frames)
        # only ODE and teacher-forcing training let gradients through the memory; in alg. 1 the cache is a constant
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            self._run_transformer(x_0, level, text, seen, captured, stop=True)
            written = seen is memory and disturb is None and not torch.is_grad_enabled()
        chunk = split_frames(captured, memory.frame_count, frames)
        after = memory.remember(disturb(chunk) if disturb else chunk)
        self.transformer.rope.hand_over_store(memory, after, chunk if written else ())
        return after

    def forget_store(self, memory: Memory) -> None:
        """Let go of the copy of a memory that passes without gradient attend to."""
        self.transformer.rope.forget_store(memory)

    def read_context(
        self, x_0: Float[Tensor, "B F C H W"], text: Float[Tensor, "B T E"], filled: Bool[Tensor, "B F"] | None = None
    ) -> Memory:
        """Return a memory of these frames, by one clean pass in which they see each other and nothing else; it keeps its graph.

        `filled` says which of them a video has.
        """
        if filled is not None and not self.transformer.rope.takes_mask:
            x_0, filled = x_0[:, read_filled(filled)], None
        captured: LayerKeyValues = {}
        self._run_transformer(x_0, x_0.new_zeros(len(x_0)), text, None, captured, filled, stop=True)
        return fixed_memory(split_frames(captured, 0, x_0.shape[1]), filled)

    def offer(
        self, x_t: Float[Tensor, "B F C H W"], sigma: Float[Tensor, " B"], text: Float[Tensor, "B T E"], memory: Memory
    ) -> tuple[Float[Tensor, "B F C H W"], Memory]:
        """Return x_0 as `forward` does, and the memory after it was offered this pass's keys (timing first_call)."""
        captured: LayerKeyValues = {}
        velocity = self._run_transformer(x_t, sigma, text, memory, captured)
        after = memory.offer(split_frames(captured, memory.frame_count, x_t.shape[1]))
        if after is not memory:
            self.transformer.rope.hand_over_store(memory, after, ())
        return to_x0(x_t, velocity, sigma), after

    def remember_clip(
        self,
        x_0: Float[Tensor, "B F C H W"],
        text: Float[Tensor, "B T E"],
        spec: MemorySpec,
        *,
        chunk: int,
    ) -> Memory:
        """Return the memory after a clip that is passed chunk by chunk, as if the student had made it."""
        memory = empty_memory(spec)
        for part in x_0.split(chunk, dim=1):
            memory = self.remember(part, text, memory)
        return memory

    def _run_transformer(
        self,
        x_t: Tensor,
        sigma: Tensor,
        text: Tensor,
        memory: Memory | None,
        captured: LayerKeyValues | None,
        filled: Tensor | None = None,
        *,
        stop: bool = False,
    ) -> Tensor:
        """Return the velocity, and fill `captured` if it is given; not otherwise, because a checkpointed pass would keep it all.

        A pass that is to `stop` is wanted for its keys and values alone: it ends with those of the last layer, its velocity means nothing.
        """
        rope = self.transformer.rope
        rope.memory, rope.captured, rope.filled = memory, captured, filled
        rope.last = len(self.transformer.blocks) - 1 if stop else None
        timestep = 1000 * sigma  # [B] or [B, F]
        if timestep.ndim == 2:  # diffusers takes a timestep for each token: [B, F * S]
            timestep = timestep.repeat_interleave(self._tokens_per_frame(x_t), dim=1)
        low, copies, given = self.compute.dtype == "bfloat16", self.copies.read(), (x_t.transpose(1, 2), timestep, text)
        try:
            with torch.autocast(x_t.device.type, torch.bfloat16, enabled=low):
                velocity = functional_call(self.transformer, copies, given, {"return_dict": False}, tie_weights=False)[0].transpose(1, 2)
        finally:
            rope.memory, rope.captured, rope.filled, rope.last = None, None, None, None
        return velocity.to(x_t.dtype)

    def _tokens_per_frame(self, x: Tensor) -> int:
        """Return S, the tokens of one latent frame."""
        _, rows, columns = self.transformer.config.patch_size
        return (x.shape[3] // rows) * (x.shape[4] // columns)
