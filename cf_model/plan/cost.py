"""What one pass of a model costs, by arithmetic alone: parameters, operations, keys and values, activations, training states.

The law of docs/method.md 1.3 for any `ModelSpec` and latent size. Operations count a multiply-add as two, matrix products
only, and are of one sample; bytes are of a batch. tests/train/test_cost.py holds all of it against PyTorch's own counting.
"""

from __future__ import annotations

from dataclasses import dataclass

from cf_model.model.denoiser import Compute, ModelSpec

PATCH = 4  # latent pixels in a token: wan.build's patch is 1 x 2 x 2
BACKWARD = 2  # operations of a backward pass over those of its forward pass


@dataclass(frozen=True)
class Forward:
    """Operations of one forward pass of one sample, by where they are spent."""

    linear: float  # of the blocks
    attention: float  # to the pass's own frames and to those remembered
    cross: float  # attention to the prompt
    text: float  # the prompt's keys and values, which diffusers computes in every pass
    ends: float  # outside the blocks: patches in and out, the prompt's and the noise level's embedding

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.cross + self.text + self.ends

    def trained(self, checkpointing: bool) -> float:
        """With its backward pass; with checkpointing the blocks run forward a second time."""
        again = self.total - self.ends if checkpointing else 0.0
        return (1 + BACKWARD) * self.total + again


@dataclass(frozen=True)
class Costs:
    """One model on latents of one size."""

    model: ModelSpec
    channels: int
    text_channels: int
    text_tokens: int
    height: int  # of a latent
    width: int
    compute: Compute

    @property
    def dim(self) -> int:
        return self.model.heads * self.model.head_dim

    @property
    def tokens(self) -> int:
        """Of one latent frame."""
        return self.height * self.width // PATCH

    @property
    def number(self) -> int:
        """Bytes of one number that is computed with."""
        return 2 if self.compute.dtype == "bfloat16" else 4

    # ------------------------------------------------------------------------------------------------------ weights

    @property
    def matrices(self) -> int:
        """Parameters in the matrices of the blocks: what Muon trains."""
        return self.model.layers * (8 * self.dim**2 + 2 * self.dim * self.model.ffn)

    @property
    def parameters(self) -> int:
        d, m, pixels = self.dim, self.model, self.channels * PATCH
        # beside the matrices of a block: 9 biases, 4 norms of queries and keys, an affine norm, 6 rows of modulation
        block = (8 + 1) * d + m.ffn + 4 * d + 2 * d + 6 * d
        embeddings = linear(pixels, d) + linear(m.freq, d) + linear(d, d) + linear(d, 6 * d) + linear(self.text_channels, d) + linear(d, d)
        return self.matrices + m.layers * block + embeddings + 2 * d + linear(d, pixels)

    # --------------------------------------------------------------------------------------------------- operations

    def forward(self, frames: int, seen: int = 0, levels: int = 1) -> Forward:
        """One pass over `frames` latent frames that look at each other and at `seen` remembered ones. `levels`: noise levels
        that are embedded, 1 or one a token."""
        d, m, t = self.dim, self.model, self.text_tokens
        queries, keys = frames * self.tokens, (frames + seen) * self.tokens
        return Forward(
            linear=m.layers * queries * (12 * d**2 + 4 * d * m.ffn),
            attention=4 * m.layers * queries * keys * d,
            cross=4 * m.layers * queries * t * d,
            text=4 * m.layers * t * d**2,
            ends=2 * d * (2 * queries * self.channels * PATCH + t * (self.text_channels + d) + levels * (m.freq + 7 * d)),
        )

    # -------------------------------------------------------------------------------------------------------- bytes

    def memory_frame(self) -> int:
        """Keys and values of one remembered latent frame, in all layers, of one sample."""
        return 2 * self.model.layers * self.tokens * self.dim * self.number

    def block(self, frames: int, seen: int = 0, levels: int = 1) -> int:
        """What one transformer block keeps for its backward pass, of one sample.

        Counted from diffusers' block: inputs of matrix products and attention in the dtype of products, norms and
        modulation in float32. With one noise level a token the modulation is as long as the sequence.
        """
        d, f, h, t = self.dim, self.model.ffn, self.model.heads, self.text_tokens
        queries, past = frames * self.tokens, seen * self.tokens
        low, high = (10, 12) if self.number == 2 else (22, 0)  # vectors of a token
        own = queries * (self.number * (low * d + 2 * f) + 4 * (high * d + 2 * h + 9))
        prompt = t * (4 * (2 * d + 1) + self.number * 2 * d)
        return own + prompt + self.number * past * 2 * d + 4 * levels * 8 * d

    def ends(self, frames: int, seen: int = 0, levels: int = 1) -> int:
        """What is kept outside the blocks: patches, head, prompt, noise levels and the tables of RoPE, which the batch shares."""
        d, m, n = self.dim, self.model, self.number
        queries, keys = frames * self.tokens, (frames + seen) * self.tokens
        pixels = (4 + n) * self.channels * PATCH  # the model's input, and the loss's difference in float32
        prompt = self.text_tokens * n * (3 * d + self.text_channels)
        noise = levels * (8 * d + n * (3 * d + m.freq))
        return queries * ((8 + n) * d + 8 + pixels) + prompt + noise + 8 * m.head_dim * (queries + (keys if seen else 0))

    def kept(self, frames: int, seen: int = 0, levels: int = 1) -> int:
        """What a whole pass keeps for its backward pass, of one sample: all of every block, or with checkpointing its input."""
        blocks = self.model.layers * self.block(frames, seen, levels)
        if self.compute.checkpointing:
            blocks = self.number * self.dim * (self.model.layers * frames * self.tokens + 6 * levels)
        return self.ends(frames, seen, levels) + blocks

    def live(self, frames: int, seen: int = 0, levels: int = 1) -> int:
        """What the backward pass holds beside that, where it holds most: a gradient inside one ffn; with checkpointing also a
        block that is computed again (measured: benchmarks/plan_memory.py)."""
        again = self.block(frames, seen, levels) if self.compute.checkpointing else 0
        return again + frames * self.tokens * self.model.ffn * self.number

    def activations(self, frames: int, seen: int = 0, levels: int = 1) -> int:
        return self.kept(frames, seen, levels) + self.live(frames, seen, levels)


def linear(inputs: int, outputs: int) -> int:
    """Parameters of a linear layer."""
    return (inputs + 1) * outputs
