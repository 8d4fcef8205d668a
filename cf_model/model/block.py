"""diffusers' transformer block in fewer operations, which a pass may leave early; a prompt's keys and values, computed once.

Passes without gradient over the chunks of a video are given one prompt, so what the cross-attentions need of it does not change from
pass to pass: 160 products of 200 in a chunk of Wan's size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as functional
from diffusers.models.activations import GELU
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .attention import PassView
from .kernels import NATIVE, attend
from .key_values import LayerKeyValues
from .plain_block import can_run_plain, is_plain_pass, run_plain_block
from .rope import apply_rope, turn_keys

# whether oneDNN computes an activation in the product on this machine's CPU, in float32 and in bfloat16
FUSES = torch.backends.mkldnn.is_available()
FUSES_HALF = FUSES and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Prompt:
    """A prompt as the cross-attentions look at it; a layer's keys and values are made when that layer first asks."""

    def __init__(self, embedded: Float[Tensor, "B T ND"], weight: Tensor, versions: tuple[int, int]) -> None:
        self.embedded, self.weight, self.versions = embedded, weight, versions
        self.layers: LayerKeyValues = {}

    def read(self, layer: int, attn: Any) -> tuple[Float[Tensor, "B T N D"], Float[Tensor, "B T N D"]]:
        """Return the keys and values of a layer whose cross-attention is `attn`."""
        if layer not in self.layers:
            k, v = project_prompt(attn, self.embedded)
            # each head's tokens in one piece, which attention reads fastest
            self.layers[layer] = k.transpose(1, 2).contiguous().transpose(1, 2), v.transpose(1, 2).contiguous().transpose(1, 2)
        return self.layers[layer]


def project_prompt(attn: Any, embedded: Float[Tensor, "B T ND"]) -> tuple[Float[Tensor, "B T N D"], Float[Tensor, "B T N D"]]:
    """Return the keys and values of an embedded prompt."""
    v = attn.to_v(embedded).unflatten(2, (attn.heads, -1))
    return attn.norm_k(attn.to_k(embedded)).unflatten(2, (attn.heads, -1)).to(v.dtype), v


class PromptProjection(PixArtAlphaTextProjection):
    """First layers of a prompt, which hand a `Prompt` to the blocks in passes without gradient."""

    prompts: WeakTensorKeyDictionary  # of the tensors that are still used somewhere

    def forward(self, caption: Float[Tensor, "B T E"]) -> Any:
        """Return the embedded prompt for the blocks: a tensor, or what is the same in all passes with this very tensor."""
        weight = self.linear_1.weight  # an optimizer that updates any weight updates this one
        # with ZeRO 3 a weight is there in its own layer's pass alone
        if torch.is_grad_enabled() or hasattr(weight, "ds_id"):
            return super().forward(caption)
        prompt, versions = self.prompts.get(caption), (weight._version, caption._version)  # torch counts what is written in place
        if prompt is None or prompt.weight is not weight or prompt.versions != versions:
            prompt = self.prompts[caption] = Prompt(super().forward(caption), weight, versions)
        return prompt


class PromptAttention:
    """Attention processor of diffusers for the prompt."""

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):  # type: ignore[no-untyped-def]
        prompt = encoder_hidden_states
        k, v = prompt.read(self.layer, attn) if isinstance(prompt, Prompt) else project_prompt(attn, prompt)
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)).to(v.dtype)
        out = attend(q, k, v, None, NATIVE)
        return attn.to_out[0](out.flatten(2, 3).type_as(hidden_states))


def add_product(base: Tensor, a: Tensor, b: Tensor, like: Float[Tensor, "B L ND"]) -> Float[Tensor, "B L ND"]:
    """Return base + a * b, computed in float32 and rounded to the type of `like`.

    Without gradient this is one operation, which reads bfloat16 and writes it; otherwise each cast would be a copy.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.addcmul(base.float(), a.float(), b).type_as(like)
    return torch.addcmul(base, a, b, out=torch.empty_like(like))


def is_narrow_pass(x: Tensor, weight: Tensor) -> bool:
    """Say whether a pass without gradient computes in bfloat16 and has this weight in it (`WeightCopies`)."""
    return x.dtype == weight.dtype == torch.bfloat16 and not torch.is_grad_enabled()


def normalize_tokens(norm: nn.LayerNorm | nn.RMSNorm, x: Float[Tensor, "B L ND"]) -> Float[Tensor, "B L ND"]:
    """Return what a norm with a weight makes of bfloat16, in one operation, which sums in float32 and rounds once."""
    # autocast would have a float32 copy of each token written first
    with torch.autocast(x.device.type, enabled=False):
        if isinstance(norm, nn.LayerNorm):
            return functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        return functional.rms_norm(x, norm.normalized_shape, norm.weight, norm.eps)


def is_on_gpu(x: Tensor) -> bool:
    """Say whether a tensor is on an NVIDIA or AMD GPU."""
    return x.device.type == "cuda"


class FusedGELU(GELU):
    """First layer of a feed-forward, whose activation is computed in the product itself; it differs by rounding.

    In bfloat16 the activation is of the product's float32 sums, so it is rounded once instead of twice.
    """

    is_fused = True  # False: the product is in 8 bits

    def forward(self, hidden_states: Float[Tensor, "B L ND"]) -> Float[Tensor, "B L H"]:
        """Return the activated product."""
        proj, x = self.proj, hidden_states
        # a layer with an adapter is another class, and with ZeRO 3 a weight is there in its own layer's pass alone
        if not self.is_fused or type(proj) is not nn.Linear or hasattr(proj.weight, "ds_id"):
            return super().forward(x)
        is_narrow = is_narrow_pass(x, proj.weight)
        if is_narrow and is_on_gpu(x) and self.approximate == "tanh":
            # a GPU's kernel has the approximate GELU; a CPU's of this name has the other one
            return torch._addmm_activation(proj.bias, x.flatten(0, 1), proj.weight.t(), use_gelu=True).unflatten(0, x.shape[:2])
        # on a CPU a compiler makes one piece of both by itself
        is_fast = FUSES_HALF if is_narrow else FUSES and is_plain_pass(x)
        if is_fast and x.device.type == "cpu" and not torch.compiler.is_compiling():
            return torch.ops.mkldnn._linear_pointwise(x, proj.weight, proj.bias, "gelu", [], self.approximate)
        return super().forward(x)


class OneDnnLinear(nn.Linear):
    """Linear layer whose product oneDNN computes, in float32 on a CPU and in passes without gradient; it differs by rounding.

    torch leaves these products to MKL, which does without the widest registers on CPUs that are not Intel's.
    """

    def forward(self, input: Float[Tensor, "*B K"]) -> Float[Tensor, "*B N"]:
        """Return the product with the weight, and the bias added."""
        # what was replaced by another class, such as a layer with an adapter, never comes here
        if input.device.type != "cpu" or not is_plain_pass(input) or torch.compiler.is_compiling():
            return super().forward(input)
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")


def multiply_by_onednn(transformer: Any) -> None:
    """Let oneDNN compute the products of all blocks of a transformer in place; raises ValueError where torch has none."""
    if not FUSES:
        raise ValueError("onednn is wanted, but this build of torch has no oneDNN; leave onednn out")
    for block in transformer.blocks:
        fused = block.ffn.net[0].proj  # which oneDNN computes already, with its activation
        for layer in block.modules():
            if type(layer) is nn.Linear and layer is not fused:
                layer.__class__ = OneDnnLinear


class TokenNorm(nn.RMSNorm):
    """Norm of queries and keys over all N * D channels of a token."""

    def forward(self, x: Float[Tensor, "B L ND"]) -> Float[Tensor, "B L ND"]:
        """Return x / sqrt(mean(x²) + eps), scaled by the weight."""
        if is_narrow_pass(x, self.weight):
            return normalize_tokens(self, x)
        if not is_plain_pass(x):
            # under autocast x is bfloat16 and the weight float32, and torch has a fused kernel only where the two are equal
            return super().forward(x.to(self.weight.dtype))
        # [B, L, 1]
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * length.square().div(x.shape[-1]).add(self.eps).rsqrt() * self.weight


class MemoryBlock(WanTransformerBlock):
    """diffusers' block in fewer operations, which ends after the last layer's keys and values where nothing else is wanted.

    What comes before and after the self-attention is a function of tensors alone, which a compiler can make one piece of.
    """

    is_compiled = False
    tables: list[Tensor]  # `scale_shift_table` of all blocks

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Any, temb: Tensor, rotary_emb: PassView) -> Tensor:
        """Return the hidden states [B, L, N * D] after this block; those of a pass that stops here mean nothing."""
        x, view, layer = hidden_states, rotary_emb, self.attn1.processor.layer
        is_last = view.last == layer
        if torch.is_grad_enabled() and not is_last:
            return super().forward(x, encoder_hidden_states, temb, view)  # a backward pass wants what diffusers stores
        # each [B, 1, N * D], or [B, L, N * D] with a level for each token; of the scales 1 + scale
        rows = view.read_rows(layer, temb, self.tables)
        if can_run_plain(self, x, view):
            return run_plain_block(self, x, encoder_hidden_states, rows, view, is_last=is_last)
        shift, scale, gate, *ffn_rows = rows
        k, v, q, turned = self._part("read_tokens")(self, x, shift, scale, torch.view_as_real(view.rotation(layer)), not is_last)
        view.capture(layer, k, v)
        if torch.is_grad_enabled():
            return x
        out = view.attend_past(layer, None if is_last else q, turned, v, self.attn1.processor.backend)
        if out is None:
            return x
        keys, values = self.read_prompt(encoder_hidden_states)
        # [B, T, N, D] to [2B, T, N, D], where two chunks of the same videos share a pass; of one video nothing is copied
        if len(keys) < len(x):
            keys, values = (part[None].expand(len(x) // len(part), *part.shape).flatten(0, 1) for part in (keys, values))
        return self._part("finish_tokens")(self, x, out, gate, keys, values, *ffn_rows)

    def read_prompt(self, prompt: Any) -> tuple[Float[Tensor, "B T N D"], Float[Tensor, "B T N D"]]:
        """Return the keys and values of a prompt in this block, made by the first pass that asks where passes share them."""
        return prompt.read(self.attn2.processor.layer, self.attn2) if isinstance(prompt, Prompt) else project_prompt(self.attn2, prompt)

    def read_tokens(self, x: Tensor, shift: Tensor, scale: Tensor, turns: Tensor, is_asked: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the self-attention's keys and values, its queries, and queries and keys are rotated: each [B, L, N, D].

        Without `is_asked` there are no queries. `turns` [1 or B, L, 1, D / 2, 2] are cos and sin of each pair of channels.
        """
        attn, rotation = self.attn1, torch.view_as_complex(turns) if not torch.compiler.is_compiling() else turns
        normed = add_product(shift, self.norm1(x.float()), scale, x)
        v = attn.to_v(normed).unflatten(2, (attn.heads, -1))
        # in bfloat16 the norm's answer is float32, which a memory need not hold
        k = attn.norm_k(attn.to_k(normed)).unflatten(2, (attn.heads, -1)).to(v.dtype)
        q = apply_rope(attn.norm_q(attn.to_q(normed)).unflatten(2, (attn.heads, -1)), rotation).to(v.dtype) if is_asked else k
        return k, v, q, turn_keys(k, rotation)

    def finish_tokens(
        self, x: Tensor, out: Tensor, gate: Tensor, keys: Tensor, values: Tensor, shift: Tensor, scale: Tensor, ffn_gate: Tensor
    ) -> Tensor:
        """Return the hidden states after the self-attention, whose answer is `out`, the prompt [B, T, N, D] and the feed-forward."""
        attn = self.attn2
        x = add_product(x, self.attn1.to_out[0](out.flatten(2).type_as(x)), gate, x)
        normed = normalize_tokens(self.norm2, x) if is_narrow_pass(x, self.norm2.weight) else self.norm2(x.float()).type_as(x)
        q = attn.norm_q(attn.to_q(normed)).unflatten(2, (attn.heads, -1)).to(values.dtype)
        x = x + attn.to_out[0](attend(q, keys, values, None, NATIVE).flatten(2).type_as(x))
        normed = add_product(shift, self.norm3(x.float()), scale, x)
        return add_product(x, self.ffn(normed), ffn_gate, x)

    def _part(self, name: str) -> Callable[..., Any]:
        """Return one of the two functions, compiled if the block is."""
        return compile_part(name) if self.is_compiled else getattr(MemoryBlock, name)


@cache
def compile_part(name: str) -> Callable[..., Any]:
    """Compile a part of all blocks, which differ in their weights alone; raises where it could not be one graph."""
    return torch.compile(getattr(MemoryBlock, name), fullgraph=True, dynamic=False)


def prepare_blocks(transformer: Any, *, compiled: bool) -> WeakTensorKeyDictionary:
    """Change a diffusers transformer's blocks and its prompt's layers in place as this file says; its weights and their names stay.

    Returns the prompts that are kept, which must be forgotten when the weights have changed.
    """
    tables = [block.scale_shift_table for block in transformer.blocks]
    for layer, block in enumerate(transformer.blocks):
        block.__class__, block.is_compiled, block.tables = MemoryBlock, compiled, tables
        block.attn2.set_processor(PromptAttention(layer))
        block.ffn.net[0].__class__ = FusedGELU
        for norm in (block.attn1.norm_q, block.attn1.norm_k, block.attn2.norm_q, block.attn2.norm_k):
            norm.__class__ = TokenNorm
    prompts = WeakTensorKeyDictionary()
    embedder = transformer.condition_embedder.text_embedder
    embedder.__class__, embedder.prompts = PromptProjection, prompts
    return prompts
