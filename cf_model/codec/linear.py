"""The small profiles' codec: principal components of every fourth frame, and a decoder that makes the frames between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from cf_model.codec.interface import SPACE, TIME, check_latent_channels, check_video_shape, group_by_latent, to_uint8

PATCH = SPACE * SPACE * 3  # numbers in a patch of one frame, 8 x 8 pixels: 192


@dataclass(frozen=True)
class CodecSpec:
    """Sizes of the linear codec, and how it is fitted."""

    channels: int
    ridge: float  # of the decoder's least squares
    width: int  # channels of the decoder's network at 1/4 of the picture's size
    steps: int  # of the network; 0: the linear decoder alone
    batch: int
    lr: float


class LinearCodec(nn.Module):
    """Codec whose latents are principal components of patches of 8 x 8 pixels of one frame in four, the last that a latent covers.

    The encoder is an orthogonal projection. The decoder of a latent also sees the latent before, because the two show where
    everything stood four frames ago and stands now, so the decoder can move it in between: a latent that held its four
    frames' average lost nearly all motion among them. The decoder is the least-squares map from both latents and their
    neighbours to the four frames, which has no block edges to speak of, plus what a small convolutional network adds to it.
    The first latent is the first frame, and its latent before is itself. Encoder and decoder are causal.
    """

    time, space = TIME, SPACE
    mean: Tensor  # [PATCH]
    encoder: Tensor  # [PATCH, C]
    decoder: Tensor  # [K, 4 PATCH], K = 18 C + 1

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.channels, self.width = channels, width
        self.register_buffer("mean", torch.zeros(PATCH))
        self.register_buffer("encoder", torch.zeros(PATCH, channels))
        self.register_buffer("decoder", torch.zeros(18 * channels + 1, TIME * PATCH))
        stages: list[nn.Module] = [nn.Conv2d(2 * channels, 2 * width, 3, padding=1)]
        for wide, narrow in ((2 * width, width), (width, width // 2), (width // 2, width // 2)):
            stages += [nn.SiLU(), nn.Conv2d(wide, 4 * narrow, 3, padding=1), nn.PixelShuffle(2)]
        last = nn.Conv2d(width // 2, TIME * 3, 3, padding=1)
        nn.init.zeros_(last.weight)  # the network starts as nothing beside the linear decoder
        self.refine = nn.Sequential(*stages, nn.SiLU(), last)

    @torch.no_grad()
    def encode(self, video: UInt8[Tensor, "B V Y X 3"]) -> Float[Tensor, "B F C H W"]:
        _, frames, height, width, _ = video.shape
        check_video_shape(frames, height, width, TIME, SPACE)
        # [B, F, H, W, PATCH] @ [PATCH, C], and channels to their place
        return ((cut_patches(video[:, ::TIME].to(self.mean.device)) - self.mean) @ self.encoder).permute(0, 1, 4, 2, 3)

    def encode_stream(self, pieces: Iterable[UInt8[Tensor, "B _ Y X 3"]]) -> Iterator[Float[Tensor, "B _ C H W"]]:
        for i, run in enumerate(group_by_latent(pieces, TIME)):
            # the first run ends with the frame of a latent, as do all others, which begin in between
            yield self.encode(run if not i else run[:, TIME - 1 :])

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B F C H W"]) -> UInt8[Tensor, "B V Y X 3"]:
        b, f, _, h, w = latents.shape
        check_latent_channels(latents, self.channels)
        pairs = pair_latents(latents.to(self.mean.device)).flatten(0, 1)
        # [B * F, 12, Y, X] to [B, 4 F, Y, X, 3]; of the first latent's four frames only the last is video
        video = torch.cat([to_uint8(self.pixels(part)) for part in pairs.split(128)])
        video = video.view(b, f * TIME, 3, h * SPACE, w * SPACE).permute(0, 1, 3, 4, 2)
        return video[:, TIME - 1 :].contiguous()

    def decode_stream(self, chunks: Iterable[Float[Tensor, "B _ C H W"]]) -> Iterator[UInt8[Tensor, "B _ Y X 3"]]:
        before: Tensor | None = None
        for chunk in chunks:
            yield self.decode(chunk) if before is None else self.decode(torch.cat([before, chunk], dim=1))[:, 1:]
            before = chunk[:, -1:]

    def pixels(self, pairs: Float[Tensor, "M C2 H W"]) -> Float[Tensor, "M 12 Y X"]:
        """Decode four RGB frames, in -1..1 but for overshoot, from each latent with the latent before it (`pair_latents`)."""
        m, _, h, w = pairs.shape
        flat = (gather_neighbours(pairs) @ self.decoder).view(m, h, w, TIME, SPACE, SPACE, 3)
        return flat.permute(0, 3, 6, 1, 4, 2, 5).reshape(m, TIME * 3, h * SPACE, w * SPACE) + self.refine(pairs)


def fit_codec(
    clips: Sequence[UInt8[Tensor, "V Y X 3"]], spec: CodecSpec, seed: int, tell: Callable[[int, float], None] = lambda step, loss: None
) -> LinearCodec:
    """Fit components and linear decoder in closed form, then train the network by squared error, calling `tell(step, loss)`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        codec = LinearCodec(spec.channels, spec.width)
    _fit_encoder(codec, clips)
    _fit_decoder(codec, clips, spec.ridge)
    rng = torch.Generator().manual_seed(seed)
    pairs = [pair_latents(codec.encode(clip[None]))[0] for clip in clips]
    optimizer = torch.optim.AdamW(codec.refine.parameters(), spec.lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(spec.steps):
        # a batch of latents, each with the latent before, and of the four frames that each covers; never a clip's first, which covers one
        which = torch.randint(len(clips), (spec.batch,), generator=rng).tolist()
        at = [1 + int(torch.randint(len(pairs[i]) - 1, (), generator=rng)) for i in which]
        truth = torch.stack([clips[i][TIME * (k - 1) + 1 : TIME * k + 1] for i, k in zip(which, at, strict=True)])
        truth = truth.permute(0, 1, 4, 2, 3).flatten(1, 2).float().div(127.5).sub(1)
        # warm-up over 30 steps, and linear decay over the second half
        for group in optimizer.param_groups:
            group["lr"] = spec.lr * min(1, (step + 1) / 30, 2 * (1 - step / spec.steps))
        loss = F.mse_loss(codec.pixels(torch.stack([pairs[i][k] for i, k in zip(which, at, strict=True)])), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tell(step + 1, loss.item())
    return codec.eval()


def _fit_encoder(codec: LinearCodec, clips: Sequence[Tensor]) -> None:
    """Set mean and encoder to the principal components of all patches of every fourth frame, in float64."""
    count, total, square = 0, torch.zeros(PATCH, dtype=torch.float64), torch.zeros(PATCH, PATCH, dtype=torch.float64)
    for clip in clips:
        p = cut_patches(clip[None, ::TIME]).flatten(0, 3).double()
        count, total, square = count + len(p), total + p.sum(0), square + p.T @ p
    mean = total / count
    variance, basis = torch.linalg.eigh(square / count - torch.outer(mean, mean))
    basis = basis.flip(1)[:, : codec.channels]
    basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()  # eigenvectors have no sign of their own
    spread = variance.flip(0)[: codec.channels].clamp_min(1e-12).sqrt()
    # Choice: a channel keeps the root of its spread, at unit variance over all of them. Whitening would give the last
    # components, mostly noise, the same weight in the loss as the first.
    scale = spread.sqrt() * spread.mean().sqrt()
    codec.mean.copy_(mean)
    codec.encoder.copy_(basis / scale)


def _fit_decoder(codec: LinearCodec, clips: Sequence[Tensor], ridge: float) -> None:
    """Set the decoder to the ridge regression from two latents with their neighbours to the patches of four frames, in float64."""
    size = len(codec.decoder)
    count, gram, cross = 0, torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, TIME * PATCH, dtype=torch.float64)
    for clip in clips:
        x = gather_neighbours(pair_latents(codec.encode(clip[None]))[0, 1:]).flatten(0, 2).double()
        # [4 F, H, W, PATCH] to [F, H, W, 4 PATCH]: the four frames of each latent but the first
        y = cut_patches(clip[None, 1:])[0].unflatten(0, (-1, TIME)).permute(0, 2, 3, 1, 4).flatten(3).flatten(0, 2).double()
        count, gram, cross = count + len(x), gram + x.T @ x, cross + x.T @ y
    codec.decoder.copy_(torch.linalg.solve(gram + ridge * count * torch.eye(size, dtype=torch.float64), cross))


def cut_patches(frames: UInt8[Tensor, "B V Y X 3"]) -> Float[Tensor, "B V H W P"]:
    """Cut frames into patches of 8 x 8 pixels in -1..1."""
    b, v, y, x, _ = frames.shape
    patches = frames.float().div(127.5).sub(1).view(b, v, y // SPACE, SPACE, x // SPACE, SPACE, 3)
    return patches.permute(0, 1, 2, 4, 3, 5, 6).flatten(4)


def pair_latents(latents: Float[Tensor, "B F C H W"]) -> Float[Tensor, "B F C2 H W"]:
    """Put the latent before in front of each latent's channels, C2 = 2 C; before the first stands the first itself."""
    return torch.cat([torch.cat([latents[:, :1], latents[:, :-1]], dim=1), latents], dim=2)


def gather_neighbours(latents: Float[Tensor, "M C H W"]) -> Float[Tensor, "M H W K"]:
    """Put each latent beside its eight neighbours in its frame (edges repeated), and a 1 for the bias: K = 9 C + 1."""
    m, c, h, w = latents.shape
    near = F.unfold(F.pad(latents, (1, 1, 1, 1), mode="replicate"), kernel_size=3).view(m, 9 * c, h, w).permute(0, 2, 3, 1)
    return torch.cat([near, near.new_ones(m, h, w, 1)], dim=-1)
