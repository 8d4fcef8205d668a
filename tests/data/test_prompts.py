from __future__ import annotations

from pathlib import Path

import pytest

from cf_model.data.prompts import LONGEST_LINE, iterate_prompts, read_prompts


def test_one_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red  disc\r\n\n  a café , at dusk\t\nfog".encode())
    assert read_prompts(file) == ["a red disc", "a café , at dusk", "fog"]


def test_line_ends_and_marks_of_any_system(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"a disc\ra bar\rfog")
    assert list(iterate_prompts(file)) == [(1, "a disc"), (2, "a bar"), (3, "fog")]
    file.write_bytes("a disc\n\ufeffa bar\r\nfog\u0085here\n".encode())
    assert read_prompts(file) == ["a disc", "a bar", "fog here"]


@pytest.mark.parametrize("content", [b"", b" \n\t\n\r\n"])
def test_files_without_prompts_are_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"^[^\n]*prompts\.txt has no prompt[^\n]*$"):
        read_prompts(file)
    with pytest.raises(ValueError, match=r"other\.txt is not there"):
        read_prompts(tmp_path / "other.txt")


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (b"caf\xe9", r"is not UTF-8 text \(byte 4\)"),
        (b"a" * (LONGEST_LINE + 1), "has more than 20,000 bytes"),
        (b"a\0b", "holds a zero byte"),
    ],
)
def test_one_bad_line_among_many_is_named_when_it_is_reached(tmp_path: Path, bad: bytes, why: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"".join(b"\n" if n % 10 == 0 else (bad if n == 9_123 else b"a red disc") + b"\n" for n in range(1, 10_001)))
    assert len(read_prompts(file, 8_000)) == 8_000  # the bad line lies behind them
    with pytest.raises(ValueError, match=rf"prompts\.txt line 9123 {why}"):
        read_prompts(file)


def test_a_file_is_read_as_it_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"first\n\nthird\n" + b"\xff\n")
    lines = iterate_prompts(file)
    assert [next(lines), next(lines)] == [(1, "first"), (3, "third")]
    file.write_bytes(b"\xff\xfea\0")
    with pytest.raises(ValueError, match="line 1 is not UTF-8"):
        next(iterate_prompts(file))
