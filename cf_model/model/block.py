"""diffusers' transformer block in fewer operations, which a pass may leave early; a prompt's keys and values, computed once.

Passes without gradient over the chunks of a video are given one prompt, so what the cross-attentions need of it does not change from
pass to pass: 160 products of 200 in a chunk of Wan's size.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .attention import PassView
from .key_values import LayerKeyValues
from .store import SlotStore


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
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        prompt = encoder_hidden_states
        k, v = prompt.read(self.layer, attn) if isinstance(prompt, Prompt) else project_prompt(attn, prompt)
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)).to(v.dtype)
        out = dispatch_attention_fn(q, k, v)
        return attn.to_out[0](out.flatten(2, 3).type_as(hidden_states))


def is_plain_pass(x: Tensor) -> bool:
    """Say whether a pass computes in float32 without gradients, where few large operations are faster than many small ones.

    The others are left to diffusers, because a backward pass wants what they store, and bfloat16 its own casts between operations.
    """
    return x.dtype == torch.float32 and not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)


class FusedGELU(GELU):
    """First layer of a feed-forward, whose activation a CPU computes in the product itself; it differs by rounding."""

    def forward(self, hidden_states: Float[Tensor, "B L ND"]) -> Float[Tensor, "B L H"]:
        """Return the activated product."""
        proj, x = self.proj, hidden_states
        # a layer with an adapter is another class, and with ZeRO 3 a weight is there in its own layer's pass alone
        is_plain = type(proj) is nn.Linear and not hasattr(proj.weight, "ds_id") and is_plain_pass(x)
        if not is_plain or x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, proj.weight, proj.bias, "gelu", [], self.approximate)


class TokenNorm(nn.RMSNorm):
    """Norm of queries and keys over all N * D channels of a token."""

    def forward(self, x: Float[Tensor, "B L ND"]) -> Float[Tensor, "B L ND"]:
        """Return x / sqrt(mean(x²) + eps), scaled by the weight."""
        if not is_plain_pass(x):
            return super().forward(x)
        # [B, L, 1]
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * length.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()).mul_(self.weight)


class MemoryBlock(WanTransformerBlock):
    """diffusers' block, of which a pass that only remembers leaves out what comes after the last layer's keys and values."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Any, temb: Tensor, rotary_emb: PassView) -> Tensor:
        """Return the hidden states [B, L, N * D] after this block; those of a pass that stops here mean nothing."""
        x, layer = hidden_states, self.attn1.processor.layer
        is_last = rotary_emb.last == layer
        if not is_last and not is_plain_pass(x):
            return super().forward(x, encoder_hidden_states, temb, rotary_emb)
        # each [B, 1, N * D], or [B, L, N * D] with a level for each token
        rows = (self.scale_shift_table + temb.float()).chunk(6, dim=-2)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (row.squeeze(2) if temb.ndim == 4 else row for row in rows)
        normed = torch.addcmul(shift, self.norm1(x.float()), 1 + scale).type_as(x)
        if is_last:
            k, v = self.attn1.processor.capture(self.attn1, normed, rotary_emb)
            if isinstance(rotary_emb.past, SlotStore):
                rotary_emb.past.write_own(layer, k, v)  # for the passes over the next chunk
            return x
        x = torch.addcmul(x, self.attn1(normed, None, None, rotary_emb), gate)
        x = x + self.attn2(self.norm2(x), encoder_hidden_states, None, None)
        normed = torch.addcmul(ffn_shift, self.norm3(x), 1 + ffn_scale)
        return torch.addcmul(x, self.ffn(normed), ffn_gate)


def keep_prompts(transformer: Any) -> WeakTensorKeyDictionary:
    """Change a diffusers transformer's blocks and its prompt's layers in place as this file says; its weights and their names stay.

    Returns the prompts that are kept, which must be forgotten when the weights have changed.
    """
    for layer, block in enumerate(transformer.blocks):
        block.__class__ = MemoryBlock
        block.attn2.set_processor(PromptAttention(layer))
        block.ffn.net[0].__class__ = FusedGELU
        for norm in (block.attn1.norm_q, block.attn1.norm_k, block.attn2.norm_q, block.attn2.norm_k):
            norm.__class__ = TokenNorm
    prompts = WeakTensorKeyDictionary()
    embedder = transformer.condition_embedder.text_embedder
    embedder.__class__, embedder.prompts = PromptProjection, prompts
    return prompts
