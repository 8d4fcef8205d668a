"""Small random networks of the published classes, in folders as `cf fetch-weights` lays them out."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

WORDS = ["<start>", "<unknown>", *"a cat dog sails past the red blue boat sea at sunset".split(), "<end>"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def write_networks(folder: Path, *roles: str) -> Path:
    """Write random networks, and return `folder`."""
    torch.manual_seed(0)
    for role in roles or ("dino", "dinov2", "clip"):
        home = folder / role
        if role == "dino":
            ViTModel(ViTConfig(**SIZES, image_size=32, patch_size=8), add_pooling_layer=False).save_pretrained(home)
        elif role == "dinov2":
            Dinov2Model(Dinov2Config(**SIZES, image_size=28, patch_size=14)).save_pretrained(home)
        else:
            ends = {"bos_token_id": 0, "eos_token_id": len(WORDS) - 1, "pad_token_id": len(WORDS) - 1}
            text = SIZES | ends | {"vocab_size": len(WORDS), "max_position_embeddings": 12}
            config = CLIPConfig(text_config=text, vision_config=SIZES | {"image_size": 32, "patch_size": 8}, projection_dim=16)
            CLIPModel(config).save_pretrained(home)
            write_tokenizer(home / "tokenizer.json")
    return folder


def write_tokenizer(file: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unknown>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    ends = [("<start>", 0), ("<end>", len(WORDS) - 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    tokenizer.save(str(file))
