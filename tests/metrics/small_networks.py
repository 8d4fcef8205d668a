"""Small random networks of the published classes, in folders as `cf fetch-weights` lays them out."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
)

WORDS = ["<start>", "<unknown>", *["a", "cat", "dog", "sails", "past", "the", "red", "blue", "boat", "sea", "at", "sunset"], "<end>"]
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


def write_judge(folder: Path) -> Path:
    """Write a random vision-language model (LLaVA) with its processor and a chat template."""
    words = ["<unk>", "<image>", "<s>", "</s>", "Score", ":", *"0123456789", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens={"image_token": "<image>"}, **special)
    template = "{% for m in messages %}{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }} {% endfor %}{% endfor %}"
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    processor = LlavaProcessor(CLIPImageProcessorPil(**sizes), fast, patch_size=8, vision_feature_select_strategy="default",
                               num_additional_image_tokens=1, chat_template=template)  # fmt: skip
    processor.save_pretrained(folder)
    torch.manual_seed(0)
    sight = CLIPVisionConfig(**SIZES, image_size=16, patch_size=8, projection_dim=16)
    text = LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=len(words), bos_token_id=2, eos_token_id=3, pad_token_id=3)
    config = LlavaConfig(vision_config=sight, text_config=text, image_token_id=1, vision_feature_select_strategy="default")
    model = LlavaForConditionalGeneration(config)
    model.generation_config.suppress_tokens = [0, 1, 2, 3]  # so that it says something
    model.save_pretrained(folder)
    return folder
