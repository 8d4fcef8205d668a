"""A block's pass in float32 and without gradient, in as few operations as torch has for it; the same numbers to the bit.

At small sizes an operation's own cost, some microseconds, is most of what is not a product or an attention. So nothing is converted to
the type that it has, what nobody else holds is overwritten, keys are rotated into their slots, and a layer whose call is a single
function is that function. Larger sizes and bfloat16 lose nothing by the block's other way, which a compiler can read, too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from jaxtyping import Float
from torch import Tensor, nn

from .attention import PassView
from .kernels import NATIVE
from .rope import VECTOR
from .store import SlotStore


def is_plain_pass(x: Tensor) -> bool:
    """Say whether a pass computes in float32 without gradients, where few large operations are faster than many small ones.

    The others are left to diffusers, because a backward pass wants what they store, and bfloat16 its own casts between operations.
    """
    return x.dtype == torch.float32 and not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)


def can_run_plain(block: Any, x: Tensor, view: PassView) -> bool:
    """Say whether `run_plain_block` can take a block's pass: not for a compiler, nor two chunks at once, nor with ZeRO 3."""
    if not is_plain_pass(x) or type(view) is not PassView or block.is_compiled or torch.compiler.is_compiling():
        return False
    attn, past = block.attn1, view.past
    if attn.processor.backend != NATIVE or (x.shape[2] // attn.heads) % VECTOR or hasattr(block.scale_shift_table, "ds_id"):
        return False
    return past is None or (isinstance(past, SlotStore) and past.keys[0].dtype == torch.float32)


def run_plain_block(
    block: Any, x: Float[Tensor, "B L ND"], prompt: Any, rows: list[Tensor], view: PassView, *, is_last: bool
) -> Float[Tensor, "B L ND"]:
    """Return the hidden states after a block; `is_last`: `x` itself, once the block's keys and values are written."""
    parts = block._modules  # by which a module is found faster than by its name
    own, cross, ffn = parts["attn1"], parts["attn2"], parts["ffn"]._modules["net"]._modules
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = rows
    # alg. 1, line 18: from the chunk to everything remembered, whose slots the chunk's own keys and values join
    out = attend_plain(own, add_product_to(shift, normalize(parts["norm1"], x), scale), view, is_last=is_last)
    if out is None:
        return x
    x = add_product_to(x, multiply(_read_out(own), out), gate)
    # from the chunk to the prompt
    q = scale_tokens(multiply(cross._modules["to_q"], normalize(parts["norm2"], x)), cross._modules["norm_q"])
    keys, values = block.read_prompt(prompt)  # [B, T, N, D]
    out = functional.scaled_dot_product_attention(_split(q, cross.heads), keys.transpose(1, 2), values.transpose(1, 2))
    x = multiply(_read_out(cross), out.transpose(1, 2).flatten(2)).add_(x)
    # the feed-forward, whose first layer computes its activation, too
    hidden = ffn["0"](add_product_to(ffn_shift, normalize(parts["norm3"], x), ffn_scale))
    return add_product_to(x, multiply(ffn["2"], hidden), ffn_gate)


def attend_plain(attn: Any, normed: Float[Tensor, "B L ND"], view: PassView, *, is_last: bool) -> Float[Tensor, "B L ND"] | None:
    """Return what the self-attention finds, before its last product; None of a pass that is over once its keys and values are written."""
    parts, layer, past = attn._modules, attn.processor.layer, view.past
    sizes, rotation = (*normed.shape[:2], attn.heads, -1), view.rotation(layer)
    v = multiply(parts["to_v"], normed).view(sizes)
    k = scale_tokens(multiply(parts["to_k"], normed), parts["norm_k"]).view(sizes)
    # raw keys, before their rotation: a memory gives them positions anew, so what is kept here is never written into again
    view.capture(layer, k, v)
    mask: Tensor | None
    if isinstance(past, SlotStore):
        keys, values, mask = past.turn_own(layer, _pair_channels(k), rotation, v)
    else:
        turned = torch.view_as_real(_pair_channels(k) * rotation).flatten(3)
        keys, values, mask = turned.transpose(1, 2), v.transpose(1, 2), view.mask
    # a pass that is wanted for its keys and values has them all now
    if is_last:
        return None
    q = scale_tokens(multiply(parts["to_q"], normed), parts["norm_q"]).view(sizes)
    # [B, L, N, D / 2] complex, in the memory of q
    _pair_channels(q).mul_(rotation)
    return functional.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask).transpose(1, 2).flatten(2)


def add_product_to(base: Tensor, a: Float[Tensor, "B L ND"], b: Tensor) -> Float[Tensor, "B L ND"]:
    """Return base + a * b in the memory of `a`, which nobody reads any more."""
    return torch.addcmul(base, a, b, out=a)


def multiply(layer: nn.Module, x: Float[Tensor, "*B K"]) -> Float[Tensor, "*B N"]:
    """Return a linear layer's product, by its function alone where its call does nothing else: no adapter, no hook."""
    if type(layer) is not nn.Linear or layer._forward_pre_hooks or layer._forward_hooks:
        return layer(x)
    weights: Any = layer._parameters
    return functional.linear(x, weights["weight"], weights["bias"])


def normalize(norm: Any, x: Float[Tensor, "B L ND"]) -> Float[Tensor, "B L ND"]:
    """Return a layer norm of float32, as diffusers' layer computes it among conversions."""
    if not isinstance(norm, nn.LayerNorm):  # a model without a norm before its prompt
        return norm(x)
    weights = norm._parameters
    return torch.layer_norm(x, norm.normalized_shape, weights["weight"], weights["bias"], norm.eps)


def scale_tokens(x: Float[Tensor, "B L ND"], norm: Any) -> Float[Tensor, "B L ND"]:
    """Scale tokens in place as `TokenNorm` does: to a root mean square of 1, then by the weight."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x.mul_(length.square_().div_(x.shape[-1]).add_(norm.eps).rsqrt_()).mul_(norm._parameters["weight"])


def _pair_channels(x: Float[Tensor, "B L N D"]) -> Tensor:
    """Return queries or keys as complex numbers, [B, L, N, D / 2], of the same memory: channels 2i and 2i + 1 are a pair."""
    return torch.view_as_complex(x.unflatten(3, (-1, 2)))


def _split(q: Float[Tensor, "B L ND"], heads: int) -> Float[Tensor, "B N L D"]:
    """Return queries by heads."""
    return q.unflatten(2, (heads, -1)).transpose(1, 2)


def _read_out(attn: Any) -> nn.Module:
    """Return an attention's last product."""
    return attn._modules["to_out"]._modules["0"]
