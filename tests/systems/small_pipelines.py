"""Small random pipelines of the diffusers classes that adapters open, saved as their folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.utils import logging
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests import pretrained

LETTERS = "abcdefghijklmnopqrstuvwxyz .,:;()<>|_{}-0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ\n"
WAN = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
       "text_dim": pretrained.WIDTH, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2}  # fmt: skip


def letter_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of single letters, as long as a template of hundreds of words needs."""
    ends = ["<pad>", "<s>", "</s>", "<unk>"]
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*ends, *LETTERS])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def text_parts(folder: Path) -> dict[str, Any]:
    """UMT5 and its tokenizer."""
    where = pretrained.save(folder / "parts")
    return {
        "text_encoder": transformers.UMT5EncoderModel.from_pretrained(where / "text_encoder"),
        "tokenizer": transformers.AutoTokenizer.from_pretrained(where / "tokenizer"),
    }


def build_wan(folder: Path) -> Any:
    return diffusers.WanPipeline(
        **text_parts(folder), vae=pretrained.vae(), transformer=diffusers.WanTransformer3DModel(**WAN),
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )  # fmt: skip


def build_skyreels(folder: Path) -> Any:
    return diffusers.SkyReelsV2DiffusionForcingPipeline(
        **text_parts(folder), vae=pretrained.vae(), transformer=diffusers.SkyReelsV2Transformer3DModel(**WAN),
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )  # fmt: skip


def build_anyflow(folder: Path) -> Any:
    return diffusers.AnyFlowFARPipeline(
        **text_parts(folder), vae=pretrained.vae(), scheduler=diffusers.FlowMapEulerDiscreteScheduler(),
        transformer=diffusers.AnyFlowFARTransformer3DModel(**WAN, chunk_partition=(1, 2, 2)),
    )  # fmt: skip


def build_ltx(folder: Path) -> Any:
    parts = text_parts(folder)
    sizes = {"d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    parts["text_encoder"] = transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(parts["tokenizer"]), **sizes))
    channels = {"block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
    depth = {"layers_per_block": (1, 1, 1, 1, 1), "decoder_layers_per_block": (1, 1, 1, 1, 1), "patch_size": 1}
    scaling = {f"{part}spatio_temporal_scaling": (True, True, False, False) for part in ("", "decoder_")}
    return diffusers.LTXPipeline(
        **parts, vae=diffusers.AutoencoderKLLTXVideo(latent_channels=8, **channels, **depth, **scaling),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, num_layers=1,
            caption_channels=24),
    )  # fmt: skip


def build_framepack(folder: Path) -> Any:
    words, small = letter_tokenizer(), {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    return diffusers.HunyuanVideoFramepackPipeline(
        text_encoder=transformers.LlamaModel(transformers.LlamaConfig(vocab_size=len(words), num_hidden_layers=3, **small)),
        tokenizer=words,
        text_encoder_2=transformers.CLIPTextModel(
            transformers.CLIPTextConfig(vocab_size=len(words), num_hidden_layers=1, projection_dim=8, eos_token_id=2, **small)),
        tokenizer_2=words,
        transformer=diffusers.HunyuanVideoFramepackTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
            num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=16, rope_axes_dim=(2, 4, 4), has_image_proj=True,
            image_proj_dim=16, has_clean_x_embedder=True, image_condition_type=None),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        image_encoder=transformers.SiglipVisionModel(
            transformers.SiglipVisionConfig(num_hidden_layers=1, image_size=32, patch_size=16, **small)),
        feature_extractor=transformers.SiglipImageProcessor(size={"height": 32, "width": 32}),
    )  # fmt: skip


BUILDERS: dict[str, Callable[[Path], Any]] = {
    "wan2.1": build_wan, "skyreels-v2": build_skyreels, "anyflow-far": build_anyflow, "ltx-video": build_ltx,
    "framepack-f1": build_framepack,
}  # fmt: skip


def write_pipeline(name: str, folder: Path) -> Path:
    """Save a system's pipeline with random weights."""
    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = BUILDERS[name](folder)
    made.save_pretrained(folder / "pipeline")
    return folder / "pipeline"
