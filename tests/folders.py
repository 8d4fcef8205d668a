"""A small whole model: transformer, codec, text encoder and recipe, with random weights."""

from __future__ import annotations

import torch

from cf_model.codec.linear import LinearCodec
from cf_model.folder import Recipe
from cf_model.pipeline import ContextForcingPipeline
from cf_model.text.encoder import WordEncoder
from tests.small import FLOW, SHAPE, denoiser, spec

SIZE = 8 * SHAPE[1]  # pixels


def codec(seed: int = 0) -> LinearCodec:
    """Encoder and decoder are random; that it keeps nothing of a picture's look does no harm here."""
    made, rng = LinearCodec(SHAPE[0], 8), torch.Generator().manual_seed(seed)
    for name, scale in (("encoder", 0.1), ("decoder", 0.1)):
        getattr(made, name).normal_(0, scale, generator=rng)
    for weight in made.refine.parameters():
        torch.nn.init.normal_(weight, std=0.1, generator=rng)
    return made.eval()


def recipe(**memory: object) -> Recipe:
    return Recipe(spec(**memory), 3, (1.0, 0.5), FLOW, 16, SIZE, SIZE, "By chance.", "Apache-2.0")


def pipeline(**memory: object) -> ContextForcingPipeline:
    """Every tested chunk is promoted, as in docs/method.md, "Promotion"."""
    return ContextForcingPipeline(denoiser(), codec(), WordEncoder(16, 8), recipe(**({"promote": "uniform"} | memory)))
