from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cf_model.text.encoder import WordEncoder, build_text_encoder, load_text_encoder, save_text_encoder
from cf_model.text.umt5 import UMT5Encoder, clean_prompt
from tests import pretrained

PROMPTS = ["a red disc.", "A  blue\tsquare turns slowly &amp;amp; fades", "", "a sea"]
TOKENS = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained.save(tmp_path_factory.mktemp("pipeline") / "small")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> UMT5Encoder:
    return UMT5Encoder(folder, TOKENS, pretrained.WIDTH, load_dtype=torch.float32)


def diffusers_own(folder: Path, prompts: list[str], tokens: int) -> torch.Tensor:
    """Through WanPipeline's own method: tokenizer of transformers, padding, mask, rows of zeros."""
    from diffusers import WanPipeline
    from transformers import AutoTokenizer, UMT5EncoderModel

    parts = SimpleNamespace(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder", local_files_only=True).eval(),
    )
    with torch.no_grad():
        return WanPipeline._get_t5_prompt_embeds(parts, prompts, max_sequence_length=tokens, device=torch.device("cpu"))


def test_vectors_are_those_of_diffusers_pipeline(folder: Path, encoder: UMT5Encoder) -> None:
    ours = encoder.encode(PROMPTS)
    assert ours.shape == (4, TOKENS, pretrained.WIDTH) and ours.dtype == torch.float32
    assert (ours - diffusers_own(folder, PROMPTS, TOKENS)).abs().max() < 1e-5
    assert ours.abs().amax((1, 2)).min() > 0.1, "the empty text too: it has the token that ends it"


def test_rows_past_the_end_are_zero_and_only_those(encoder: UMT5Encoder) -> None:
    for text, rows in zip(PROMPTS, encoder.encode(PROMPTS), strict=True):
        there = encoder.length(text)
        assert rows[:there].any(1).all() and not rows[there:].any()
    assert [encoder.length(text) for text in ("", "a sea", "a red disc.")] == [1, 3, 5]


def test_a_text_does_not_depend_on_those_beside_it(encoder: UMT5Encoder) -> None:
    assert torch.equal(encoder.encode(PROMPTS), torch.cat([encoder.encode([text]) for text in PROMPTS]))


def test_a_long_text_is_cut_and_says_how_long_it_was(folder: Path, encoder: UMT5Encoder) -> None:
    text = "a red disc " * 40
    assert encoder.length(text) == 121 > encoder.tokens
    assert (encoder.encode([text]) - diffusers_own(folder, [text], TOKENS)).abs().max() < 1e-5
    words = WordEncoder(16, 8)
    assert words.length(text) == 120 and torch.equal(words.encode([text]), words.encode([text[: 16 * 4]]))


@given(st.text() | st.lists(st.sampled_from(["&amp;", "&lt", "â€™", "\u00a0", " ", "\n", "\u2003", "ﬁ", "x"])).map("".join))
def test_prompts_are_cleaned_as_diffusers_cleans_them(text: str) -> None:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert clean_prompt(text) == prompt_clean(text)


def test_half_precision_weights_and_float32_vectors(folder: Path, encoder: UMT5Encoder) -> None:
    half = UMT5Encoder(folder, TOKENS, pretrained.WIDTH, load_dtype=torch.bfloat16)
    vectors = half.encode(PROMPTS)
    assert half.model.dtype == torch.bfloat16 and vectors.dtype == torch.float32
    assert 0 < (vectors - encoder.encode(PROMPTS)).abs().max() < 0.1


def test_there_and_back(encoder: UMT5Encoder, tmp_path: Path) -> None:
    for one in (encoder, WordEncoder(16, 8)):
        save_text_encoder(one, tmp_path / type(one).__name__)
        again = load_text_encoder(tmp_path / type(one).__name__, load_dtype=torch.float32)
        assert torch.equal(again.encode(PROMPTS), one.encode(PROMPTS))


def test_weights_are_loaded_late_and_their_files_checked_early(folder: Path, tmp_path: Path) -> None:
    encoder = UMT5Encoder(folder, TOKENS, pretrained.WIDTH, load_dtype=torch.float32)
    assert encoder.length("a sea") == 3 and "model" not in vars(encoder)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    file = copy / "text_encoder/model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors is cut off or no safetensors file"):
        build_text_encoder("umt5", copy, TOKENS, pretrained.WIDTH)
    index = {"weight_map": {"shared.weight": "model-00001-of-00002.safetensors"}}
    (copy / "text_encoder/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors isn't there"):
        build_text_encoder("umt5", copy, TOKENS, pretrained.WIDTH)
    (copy / "tokenizer/tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        build_text_encoder("umt5", copy, TOKENS, pretrained.WIDTH)


def test_weights_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    name, file = "encoder.final_layer_norm.weight", copy / "text_encoder/model.safetensors"
    state = load_file(file)
    one = state.pop(name)
    shape = rf"has {name} of \[3\], not \[24\]"
    for change, said in (({}, f"has no {name}"), ({name: one[:3]}, shape), ({name: one, "odd": one.clone()}, "has odd, which")):
        save_file(state | change, file)
        with pytest.raises(ValueError, match=said):
            build_text_encoder("umt5", copy, TOKENS, pretrained.WIDTH).encode(["a"])


def test_settings_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"text\.weights must name a folder with text_encoder/ and tokenizer/tokenizer\.json inside"):
        build_text_encoder("umt5", tmp_path, TOKENS, 8)
    with pytest.raises(ValueError, match=r"text\.channels is 8, but .* gives vectors of 24; use 24"):
        build_text_encoder("umt5", folder, TOKENS, 8)
    with pytest.raises(ValueError, match=r"text\.kind is umt5, but text\.weights is null"):
        build_text_encoder("umt5", None, TOKENS, 8)
    with pytest.raises(ValueError, match=r"holds no text\.json"):
        load_text_encoder(tmp_path)
