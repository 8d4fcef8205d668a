"""Count what one pass of a model costs, by arithmetic alone: parameters, operations, bytes of keys and values and of activations.

The formulas of docs/method.md, "Cost", for any `ModelSpec` and latent size. Operations count a multiply-add as two, in matrix products
only. Operations and bytes are those of one sample. tests/train/test_cost.py compares all of them with PyTorch's own counting.
"""

from __future__ import annotations

from dataclasses import dataclass

from cf_model.model.denoiser import Compute
from cf_model.model.sizes import ModelSpec

TOKEN_PIXELS = 4  # latent pixels in a token: wan.build's patch is 1 x 2 x 2
BACKWARD_RATIO = 2  # operations of a backward pass over those of its forward pass


@dataclass(frozen=True)
class ForwardOperations:
    """Operations of one forward pass of one sample, by the part of the model."""

    linear: float  # of the blocks
    attention: float  # to the pass's own frames and to the remembered frames
    cross: float  # attention to the prompt
    text: float  # the prompt's keys and values, which diffusers computes in every pass
    ends: float  # outside the blocks: patches in and out, the prompt's and the noise level's embedding
    prompt: float  # of these, the prompt's embedding
    last: float  # of the last block, what comes after its keys and values

    @property
    def repeated(self) -> float:
        """Operations of a pass without gradient whose prompt an earlier pass has read (cf_model/model/block.py)."""
        return self.total - self.text - self.prompt

    @property
    def remembered(self) -> float:
        """Operations of such a pass that is made for its keys and values alone."""
        return self.repeated - self.last

    @property
    def total(self) -> float:
        """Operations of the whole pass."""
        return self.linear + self.attention + self.cross + self.text + self.ends

    def trained(self, checkpointing: bool, *, ends_early: bool = False) -> float:
        """Return the operations with the backward pass; with checkpointing the blocks run forward a second time.

        `ends_early` says that the pass is made for its keys and values alone.
        """
        made = self.total - self.last if ends_early else self.total
        again = made - self.ends if checkpointing else 0.0
        return (1 + BACKWARD_RATIO) * made + again


@dataclass(frozen=True)
class ModelCosts:
    """Costs of one model on latents of one size. In all methods `frames` are latent frames, `past` the remembered frames that the pass
    attends to, and `levels` the noise levels that are embedded: 1, or one for each token."""

    model: ModelSpec
    channels: int
    text_channels: int
    text_tokens: int
    height: int  # of a latent
    width: int
    compute: Compute

    @property
    def dim(self) -> int:
        """Width of the transformer."""
        return self.model.heads * self.model.head_dim

    @property
    def tokens(self) -> int:
        """Tokens of one latent frame."""
        return self.height * self.width // TOKEN_PIXELS

    @property
    def number_bytes(self) -> int:
        """Bytes of one number in a matrix product."""
        return 2 if self.compute.dtype == "bfloat16" else 4

    @property
    def matrices(self) -> int:
        """Parameters in the matrices of the blocks, which Muon trains."""
        return self.model.layers * (8 * self.dim**2 + 2 * self.dim * self.model.ffn)

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        d, m, pixels = self.dim, self.model, self.channels * TOKEN_PIXELS
        # beside the matrices of a block: 9 biases, 4 norms of queries and keys, an affine norm, 6 rows of modulation
        block = (8 + 1) * d + m.ffn + 4 * d + 2 * d + 6 * d
        # patches; noise level: two layers and its projection to six rows of modulation; prompt: two layers
        layers = [(pixels, d), (m.freq, d), (d, d), (d, 6 * d), (self.text_channels, d), (d, d)]
        embeddings = sum(count_linear_parameters(inputs, outputs) for inputs, outputs in layers)
        return self.matrices + m.layers * block + embeddings + 2 * d + count_linear_parameters(d, pixels)

    def forward(self, frames: int, past: int = 0, levels: int = 1) -> ForwardOperations:
        """Count the operations of a pass over `frames` that attend to each other and to `past` remembered frames."""
        d, m, t = self.dim, self.model, self.text_tokens
        queries, keys = frames * self.tokens, (frames + past) * self.tokens
        # products of a block: keys and values 4 d², then queries, answer, the prompt's queries and answer 8 d², and the ffn
        after_keys = queries * (8 * d**2 + 4 * d * m.ffn) + 4 * queries * keys * d + 4 * queries * t * d
        pixels, prompt = 2 * d * queries * self.channels * TOKEN_PIXELS, 2 * d * t * (self.text_channels + d)
        return ForwardOperations(
            linear=m.layers * queries * (12 * d**2 + 4 * d * m.ffn),
            attention=4 * m.layers * queries * keys * d,
            cross=4 * m.layers * queries * t * d,
            text=4 * m.layers * t * d**2,
            ends=2 * pixels + prompt + 2 * d * levels * (m.freq + 7 * d),
            prompt=prompt,
            last=after_keys,
        )

    def prompt_bytes(self) -> int:
        """Count the bytes that passes without gradient keep of a prompt: its embedding, and its keys and values in all layers."""
        return (1 + 2 * self.model.layers) * self.text_tokens * self.dim * self.number_bytes

    def frame_bytes(self) -> int:
        """Count the bytes of the keys and values of one remembered latent frame, in all layers."""
        return 2 * self.model.layers * self.tokens * self.dim * self.number_bytes

    def block_bytes(self, frames: int, past: int = 0, levels: int = 1) -> int:
        """Count the bytes that one transformer block saves for its backward pass.

        Counted from diffusers' block: inputs of matrix products and attention in the dtype of products, norms and
        modulation in float32. With one noise level a token the modulation is as long as the sequence.
        """
        d, f, h, t = self.dim, self.model.ffn, self.model.heads, self.text_tokens
        queries, keys = frames * self.tokens, past * self.tokens
        low, high = (10, 12) if self.number_bytes == 2 else (22, 0)  # vectors of a token
        tokens = queries * (self.number_bytes * (low * d + 2 * f) + 4 * (high * d + 2 * h + 9))
        prompt = t * (4 * (2 * d + 1) + self.number_bytes * 2 * d)
        return tokens + prompt + self.number_bytes * keys * 2 * d + 4 * levels * 8 * d

    def end_bytes(self, frames: int, past: int = 0, levels: int = 1) -> int:
        """Count the bytes saved outside the blocks: patches, head, prompt, noise levels and the tables of RoPE, which the batch shares."""
        d, m, n = self.dim, self.model, self.number_bytes
        queries, keys = frames * self.tokens, (frames + past) * self.tokens
        pixels = (4 + n) * self.channels * TOKEN_PIXELS  # the model's input, and the loss's difference in float32
        prompt = self.text_tokens * n * (3 * d + self.text_channels)
        noise = levels * (8 * d + n * (3 * d + m.freq))
        return queries * ((8 + n) * d + 8 + pixels) + prompt + noise + 4 * m.head_dim * (queries + (keys if past else 0))

    def saved_bytes(self, frames: int, past: int = 0, levels: int = 1) -> int:
        """Count the bytes that a whole pass saves for its backward pass: all of every block, or with checkpointing each block's input."""
        blocks = self.model.layers * self.block_bytes(frames, past, levels)
        if self.compute.checkpointing:
            blocks = self.number_bytes * self.dim * (self.model.layers * frames * self.tokens + 6 * levels)
        return self.end_bytes(frames, past, levels) + blocks

    def live_bytes(self, frames: int, past: int = 0, levels: int = 1) -> int:
        """Count the bytes that the backward pass needs beside `saved_bytes` at its peak: a gradient inside one ffn.

        With checkpointing a block that is computed again is added (measured: benchmarks/plan_memory.py).
        """
        again = self.block_bytes(frames, past, levels) if self.compute.checkpointing else 0
        return again + frames * self.tokens * self.model.ffn * self.number_bytes

    def passing_bytes(self, frames: int, past: int = 0) -> int:
        """Count the bytes that a pass without gradient holds at its peak: one block's keys and values, of past and pass, and its ffn.

        Beside these some vectors as long as the sequence: residual, norm, queries, the attention's answer and what they are made of.
        """
        keys = (frames + past) * self.frame_bytes() // self.model.layers
        return keys + frames * self.tokens * self.number_bytes * (2 * self.model.ffn + 6 * self.dim)

    def activation_bytes(self, frames: int, past: int = 0, levels: int = 1) -> int:
        """Count the bytes of activations at the peak of a forward and backward pass."""
        return self.saved_bytes(frames, past, levels) + self.live_bytes(frames, past, levels)


def count_linear_parameters(inputs: int, outputs: int) -> int:
    """Count the parameters of a linear layer."""
    return (inputs + 1) * outputs
