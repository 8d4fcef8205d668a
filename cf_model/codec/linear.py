"""The small profiles' codec: principal components of pixel patches, fitted on a processor within seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from cf_model.codec.interface import SPACE, TIME, check_latent_channels, check_video_shape, group_by_latent, to_uint8

PATCH_VALUES = TIME * SPACE * SPACE * 3  # numbers in a patch: 768


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
    """Codec whose latents are principal components of patches of 4 x 8 x 8 pixels, decoded with their neighbours and a small network.

    The encoder is an orthogonal projection. The decoder is the least-squares map from a latent and its eight
    neighbours to the patch, which has no block edges to speak of, plus what a small convolutional network adds to it.
    The first frame is encoded as four equal frames, and decoded as the last of its four, so any run of latents can be
    decoded alone, and chunk after chunk gives the same frames as all at once.
    """

    time, space = TIME, SPACE
    mean: Tensor  # [P], P = PATCH_VALUES
    encoder: Tensor  # [P, C]
    decoder: Tensor  # [K, P], K = 9 C + 1

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.channels, self.width = channels, width
        self.register_buffer("mean", torch.zeros(PATCH_VALUES))
        self.register_buffer("encoder", torch.zeros(PATCH_VALUES, channels))
        self.register_buffer("decoder", torch.zeros(9 * channels + 1, PATCH_VALUES))
        stages: list[nn.Module] = [nn.Conv2d(channels, 2 * width, 3, padding=1)]
        for wide, narrow in ((2 * width, width), (width, width // 2), (width // 2, width // 2)):
            stages += [nn.SiLU(), nn.Conv2d(wide, 4 * narrow, 3, padding=1), nn.PixelShuffle(2)]
        last = nn.Conv2d(width // 2, TIME * 3, 3, padding=1)
        nn.init.zeros_(last.weight)  # the network starts as nothing beside the linear decoder
        self.refine = nn.Sequential(*stages, nn.SiLU(), last)

    @torch.no_grad()
    def encode(self, video: UInt8[Tensor, "B V Y X 3"]) -> Float[Tensor, "B F C H W"]:
        # [B, F, H, W, P] @ [P, C], and channels to their place
        return ((extract_patches(video.to(self.mean.device)) - self.mean) @ self.encoder).permute(0, 1, 4, 2, 3)

    def encode_stream(self, pieces: Iterable[UInt8[Tensor, "B _ Y X 3"]]) -> Iterator[Float[Tensor, "B _ C H W"]]:
        for i, run in enumerate(group_by_latent(pieces, TIME)):
            # a frame in front stands for the latent before, which is cut off again
            yield self.encode(torch.cat([run[:, :1], run], dim=1))[:, 1:] if i else self.encode(run)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B F C H W"]) -> UInt8[Tensor, "B V Y X 3"]:
        b, f, _, h, w = latents.shape
        check_latent_channels(latents, self.channels)
        parts = [to_uint8(self.pixels(part)) for part in latents.to(self.mean.device).flatten(0, 1).split(128)]
        # [B * F, 12, Y, X] to [B, 4 F, Y, X, 3]; of the first latent's four frames only the last is video
        video = torch.cat(parts).view(b, f * TIME, 3, h * SPACE, w * SPACE).permute(0, 1, 3, 4, 2)
        return video[:, TIME - 1 :].contiguous()

    def decode_stream(self, chunks: Iterable[Float[Tensor, "B _ C H W"]]) -> Iterator[UInt8[Tensor, "B _ Y X 3"]]:
        for i, chunk in enumerate(chunks):
            # a latent in front gives the chunk's first latent its four frames
            yield self.decode(torch.cat([chunk[:, :1], chunk], dim=1))[:, 1:] if i else self.decode(chunk)

    def pixels(self, latents: Float[Tensor, "M C H W"]) -> Float[Tensor, "M 12 Y X"]:
        """Decode four RGB frames from each latent, in -1..1 but for overshoot."""
        m, _, h, w = latents.shape
        flat = (gather_neighbours(latents) @ self.decoder).view(m, h, w, TIME, SPACE, SPACE, 3)
        return flat.permute(0, 3, 6, 1, 4, 2, 5).reshape(m, TIME * 3, h * SPACE, w * SPACE) + self.refine(latents)


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
    latents = [codec.encode(clip[None])[0] for clip in clips]
    optimizer = torch.optim.AdamW(codec.refine.parameters(), spec.lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(spec.steps):
        # a batch of single latents and of the four frames that each covers; never a clip's first, which covers one
        which = torch.randint(len(clips), (spec.batch,), generator=rng).tolist()
        at = [1 + int(torch.randint(len(latents[i]) - 1, (), generator=rng)) for i in which]
        truth = torch.stack([clips[i][TIME * (k - 1) + 1 : TIME * k + 1] for i, k in zip(which, at, strict=True)])
        truth = truth.permute(0, 1, 4, 2, 3).flatten(1, 2).float().div(127.5).sub(1)
        # warm-up over 30 steps, and linear decay over the second half
        for group in optimizer.param_groups:
            group["lr"] = spec.lr * min(1, (step + 1) / 30, 2 * (1 - step / spec.steps))
        loss = F.mse_loss(codec.pixels(torch.stack([latents[i][k] for i, k in zip(which, at, strict=True)])), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tell(step + 1, loss.item())
    return codec.eval()


def _fit_encoder(codec: LinearCodec, clips: Sequence[Tensor]) -> None:
    """Set mean and encoder to the principal components of all patches of all clips, in float64."""
    count, total, square = 0, torch.zeros(PATCH_VALUES, dtype=torch.float64), torch.zeros(PATCH_VALUES, PATCH_VALUES, dtype=torch.float64)
    for clip in clips:
        p = extract_patches(clip[None]).flatten(0, 3).double()
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
    """Set the decoder to the ridge regression from a latent with its neighbours to its patch, in float64."""
    size = len(codec.decoder)
    count, gram, cross = 0, torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, PATCH_VALUES, dtype=torch.float64)
    for clip in clips:
        x = gather_neighbours(codec.encode(clip[None])[0]).flatten(0, 2).double()
        y = extract_patches(clip[None]).flatten(0, 3).double()
        count, gram, cross = count + len(x), gram + x.T @ x, cross + x.T @ y
    codec.decoder.copy_(torch.linalg.solve(gram + ridge * count * torch.eye(size, dtype=torch.float64), cross))


def extract_patches(video: UInt8[Tensor, "B V Y X 3"]) -> Float[Tensor, "B F H W P"]:
    """Cut a video into patches of 4 x 8 x 8 pixels in -1..1, the first frame repeated four times."""
    b, v, y, x, _ = video.shape
    check_video_shape(v, y, x, TIME, SPACE)
    video = torch.cat([video[:, :1].expand(-1, TIME - 1, -1, -1, -1), video], dim=1).float().div(127.5).sub(1)
    video = video.view(b, -1, TIME, y // SPACE, SPACE, x // SPACE, SPACE, 3)
    return video.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)


def gather_neighbours(latents: Float[Tensor, "M C H W"]) -> Float[Tensor, "M H W K"]:
    """Put each latent beside its eight neighbours in its frame (edges repeated), and a 1 for the bias: K = 9 C + 1."""
    m, c, h, w = latents.shape
    near = F.unfold(F.pad(latents, (1, 1, 1, 1), mode="replicate"), kernel_size=3).view(m, 9 * c, h, w).permute(0, 2, 3, 1)
    return torch.cat([near, near.new_ones(m, h, w, 1)], dim=-1)
