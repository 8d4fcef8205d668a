from __future__ import annotations

import subprocess
import sys

import torch
from hypothesis import given
from hypothesis import strategies as st

from cf_model.text.encoder import WordEncoder

ENCODER = WordEncoder(8, 64)


def test_empty_is_the_null_prompt_and_rows_past_the_end_are_zero() -> None:
    null, text = ENCODER.encode(["", "A red disc ."])
    assert (null == 0).all()
    assert (text[:4] != 0).any(1).all() and (text[4:] == 0).all()


def test_words_decide_and_case_and_spaces_do_not() -> None:
    one, same, other = ENCODER.encode(["a Red disc, here", "A  red\tdisc , HERE", "a red square, here"])
    assert torch.equal(one, same)
    assert torch.equal(one[[0, 1, 3, 4]], other[[0, 1, 3, 4]]) and not torch.equal(one[2], other[2])


def test_order_counts() -> None:
    one, other = ENCODER.encode(["red blue", "blue red"])
    assert torch.allclose(one.sum(0), other.sum(0), atol=1e-5), "the same words and the same places"
    assert not torch.equal(one[0], other[1]) and not torch.equal(one[0], other[0])


def test_long_texts_are_cut() -> None:
    words = [f"w{i}" for i in range(12)]
    long, short = ENCODER.encode([" ".join(words), " ".join(words[:8])])
    assert torch.equal(long, short)


@given(st.lists(st.text(), min_size=1, max_size=4))
def test_any_text_has_finite_vectors_that_do_not_depend_on_the_batch(texts: list[str]) -> None:
    together = ENCODER.encode(texts)
    assert together.shape == (len(texts), 8, 64) and together.dtype == torch.float32 and together.isfinite().all()
    assert torch.equal(together, torch.cat([ENCODER.encode([text]) for text in texts]))


def test_different_words_are_nearly_orthogonal() -> None:
    vectors = WordEncoder(1, 256).encode(["red", "green", "blue", "disc", "square", "fog", "slow", "fast"])[:, 0]
    away = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1).fill_diagonal_(0)
    assert away.abs().max() < 0.5  # the shared position's part is 0.2


def test_another_process_has_the_same_vectors() -> None:
    """Python's own hash differs between processes."""
    code = "from cf_model.text.encoder import WordEncoder; print(WordEncoder(8, 64).encode(['a red disc']).double().sum().item())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(out) == ENCODER.encode(["a red disc"]).double().sum().item()
