"""Wan's published pipeline in small: the same folders, random weights, and a tokenizer that knows a few words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = ["▁a", "▁red", "▁blue", "▁disc", "▁square", "▁turns", "▁slow", "ly", "▁sea", "▁", ".", *"abcdefghijklmnopqrstuvwxyz"]
WIDTH = 24


def vae(seed: int = 0, **changes: Any) -> AutoencoderKLWan:
    """Four channels whose constants are far from 0 and 1."""
    sizes = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
    constants = {"latents_mean": [0.1, -0.2, 0.3, 0.5], "latents_std": [0.2, 0.4, 0.1, 0.3]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKLWan(**(sizes | constants | changes)).eval()


def tokenizer() -> Tokenizer:
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((word, -float(i)) for i, word in enumerate(WORDS))]
    made = Tokenizer(models.Unigram(scores, unk_id=2))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return made


def save(folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """vae/, text_encoder/ and tokenizer/."""
    from transformers import UMT5Config, UMT5EncoderModel

    vae().to(dtype).save_pretrained(folder / "vae")
    sizes = {"d_model": WIDTH, "d_kv": 6, "d_ff": 32, "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        UMT5EncoderModel(UMT5Config(vocab_size=3 + len(WORDS), **sizes)).to(dtype).save_pretrained(folder / "text_encoder")
    words = tokenizer()
    words.enable_truncation(7)  # stored in the file, and of no consequence
    words.enable_padding(length=7)
    (folder / "tokenizer").mkdir(parents=True)
    words.save(str(folder / "tokenizer/tokenizer.json"))
    about = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(about))
    return folder
