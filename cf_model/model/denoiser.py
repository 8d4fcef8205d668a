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
from .kernels import BACKENDS, NATIVE, WITHOUT_MASK, AttentionShape, choose_kernel
from .key_values import Frames, KeyValues, LayerKeyValues, split_frames
from .memory import Memory, MemorySpec, empty_memory
from .precision import WeightCopies, narrow_to_fp8, prepare_layers
from .store import SlotStore, read_filled

Attention = Literal["auto", "native", "cudnn", "flash2", "flash3"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Compute:
    """How a model computes: kernel, precision, and what is stored for the backward pass. Results differ by rounding alone."""

    attention: Attention  # of the self-attention, by diffusers' dispatcher; auto: the fastest of those that are installed
    dtype: Precision  # of the products; weights, norms and sums stay in float32
    checkpointing: bool  # compute a block's activations again in the backward pass instead of storing them
    compiled: bool  # passes without gradient by torch.compile, part by part of a block; a minute of compiling, once for all blocks
    graphs: bool  # passes without gradient over a memory as CUDA graphs, once each is captured
    merged: bool  # in generation: a chunk's clean pass and the next chunk's first step in one pass

    def __post_init__(self) -> None:
        # flash and cuDNN kernels exist for half precision only
        if self.attention not in ("auto", "native") and self.dtype == "float32":
            problem = f"attention is {self.attention}, which computes in bfloat16, but dtype is {self.dtype}"
            raise ValueError(f"{problem}; use dtype: bfloat16, or attention: native")


EXACT = Compute(attention="native", dtype="float32", checkpointing=False, compiled=False, graphs=False, merged=False)


class Denoiser(nn.Module):
    """Predictor of x_0 from x_σ, the prompt and the remembered frames.

    Its state_dict has diffusers' keys under `transformer.`, so weights go to and fro unchanged.
    """

    def __init__(self, transformer: Any, compute: Compute = EXACT) -> None:
        super().__init__()
        from .block import prepare_blocks  # here, so that reading params needs no diffusers

        kernel = NATIVE if compute.attention == "auto" else compute.attention
        backend, package = BACKENDS[kernel]
        if package and importlib.util.find_spec(package) is None:
            raise ValueError(f"attention is {kernel}, but the package {package} is not installed; install it, or use native")
        if kernel != NATIVE and not torch.cuda.is_available():
            raise ValueError(f"attention is {kernel}, which needs a GPU, and there is none; use native")
        if compute.graphs and not torch.cuda.is_available():
            raise ValueError("graphs is true, which needs a GPU, and there is none; use graphs: false")
        # the two seams: positions and memory by way of `rope`, attention by its processor
        transformer.rope = MemoryRope(transformer.rope)
        transformer.rope.takes_mask = kernel not in WITHOUT_MASK
        for layer, block in enumerate(transformer.blocks):
            block.attn1.set_processor(MemoryAttention(layer, backend))
        prompts = prepare_blocks(transformer, compiled=compute.compiled)
        prepare_layers(transformer, checkpointing=compute.checkpointing)
        self.transformer: Any = transformer  # diffusers' WanTransformer3DModel, which this file doesn't import
        self.compute, self.copies = compute, WeightCopies(transformer, prompts, wanted=compute.dtype == "bfloat16")
        self.kernel: str = kernel  # the attention kernel in use
        self._kernels = dict[AttentionShape, str]()  # the fastest for each shape that was met (attention: auto)

    def freeze(self) -> Denoiser:
        """Let nothing train this model any more, and keep the weights of its products in the width that they are used in."""
        self.requires_grad_(False)
        self.copies.narrow_originals()
        return self

    def narrow_to_fp8(self) -> Denoiser:
        """Freeze the model and compute its blocks' products in 8 bits from now on (torchao); `check_fp8` says where that is possible."""
        self.freeze()
        narrow_to_fp8(self.transformer)
        return self

    def multiply_by_onednn(self) -> Denoiser:
        """Freeze the model and let oneDNN compute its blocks' products on a CPU; for generation, because a training step keeps its bits."""
        from .block import multiply_by_onednn  # here, so that reading params needs no diffusers

        self.freeze()
        multiply_by_onednn(self.transformer)
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

    def remember_and_denoise(
        self, x_0: Float[Tensor, "B F C H W"], x_t: Float[Tensor, "B F C H W"], sigma: Float[Tensor, " B"], text: Tensor, memory: Memory
    ) -> tuple[Float[Tensor, "B F C H W"], Memory]:
        """Remember a finished chunk and take the next chunk's first step, in one pass where that gives the same (`compute.merged`).

        Returns x_0 of the next chunk and the memory after the finished one, as `remember` and then `forward` would. Nothing has a graph.
        """
        frames, rope = x_0.shape[1], self.transformer.rope
        chunk = tuple(KeyValues(memory.frame_count + frame, [], []) for frame in range(frames))
        foreseen = memory.foresee(chunk)
        if foreseen is None or x_0.shape != x_t.shape or not rope.can_merge(memory, foreseen, x_0.transpose(1, 2)):
            with torch.no_grad():
                after = self.remember(x_0, text, memory)
                return self(x_t, sigma, text, after), after
        with torch.no_grad():
            # [2B, F, C, H, W]: alg. 1, line 21, for the finished chunk and line 18 for the next one
            rope.next = foreseen, chunk
            levels = torch.cat([torch.zeros_like(sigma), sigma])
            velocity = self._run_transformer(torch.cat([x_0, x_t]), levels, text, memory, None)[len(x_0) :]
            after = memory.remember(chunk, foreseen)
        rope.rename_store(foreseen, after)
        return to_x0(x_t, velocity, sigma), after

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
        if self.compute.attention == "auto":
            self._choose_attention(x_t, memory)
        if self.compute.graphs and not torch.is_grad_enabled() and memory is not None and memory.places and rope.next is None:
            velocity, found = self._run_graph(x_t, sigma, text, memory, captured is not None, stop=stop)
            if captured is not None:
                captured.update(found)
            return velocity
        return self._run_pass(x_t, sigma, text, memory, captured, filled, stop=stop)

    def _run_graph(
        self, x_t: Tensor, sigma: Tensor, text: Tensor, memory: Memory, is_captured: bool, *, stop: bool
    ) -> tuple[Tensor, LayerKeyValues]:
        """Run a pass without gradient by a CUDA graph, if one was captured of its kind: the slots that it writes, its shapes, its end."""
        rope = self.transformer.rope
        store = rope.open_store(memory, x_t.transpose(1, 2))  # brought to the memory here, because that is not part of the graph
        own = store.own
        # What the host decides about a pass is fixed in its graph, so that passes that differ in it are of another kind.
        masked = tuple(mask is not None for mask in own.masks)
        kind = tuple(own.slots), tuple(own.used), masked, x_t.shape, sigma.shape, is_captured, stop

        def run(x_t: Tensor, sigma: Tensor) -> tuple[Tensor, LayerKeyValues]:
            captured: LayerKeyValues | None = {} if is_captured else None
            velocity = self._run_pass(x_t, sigma, text, store, captured, stop=stop)
            return velocity, captured or {}

        return store.graphs.run(kind, (text, self.copies.version, self.kernel), (x_t, sigma), run)

    def _choose_attention(self, x: Tensor, memory: Memory | None) -> None:
        """Take the fastest attention kernel for a pass's shapes, measured when they are met first (`attention: auto`)."""
        config, tokens = self.transformer.config, self._tokens_per_frame(x)
        seen = x.shape[1] if memory is None or not memory.places else memory.spec.size
        low = torch.bfloat16 if self.compute.dtype == "bfloat16" else torch.float32
        sizes = len(x), x.shape[1] * tokens, seen * tokens, config.num_attention_heads, config.attention_head_dim
        shape = AttentionShape(*sizes, low, x.device)
        if shape not in self._kernels:
            self._kernels[shape] = choose_kernel(shape)
        kernel = self._kernels[shape]
        if kernel != self.kernel:
            self.kernel = kernel
            self.transformer.rope.change_kernel(takes_mask=kernel not in WITHOUT_MASK)
            for block in self.transformer.blocks:
                block.attn1.processor.backend = BACKENDS[kernel][0]

    def _run_pass(
        self,
        x_t: Tensor,
        sigma: Tensor,
        text: Tensor,
        memory: Memory | SlotStore | None,
        captured: LayerKeyValues | None,
        filled: Tensor | None = None,
        *,
        stop: bool = False,
    ) -> Tensor:
        """Run the pass itself, operation by operation; over a store that is already brought to its memory, or over a memory."""
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
            rope.memory, rope.captured, rope.filled, rope.last, rope.next = None, None, None, None, None
        return velocity.to(x_t.dtype)

    def _tokens_per_frame(self, x: Tensor) -> int:
        """Return S, the tokens of one latent frame."""
        _, rows, columns = self.transformer.config.patch_size
        return (x.shape[3] // rows) * (x.shape[4] // columns)
