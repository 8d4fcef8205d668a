from __future__ import annotations

from pathlib import Path

import pytest

from cf_model.data.prompts import read_prompts


def test_one_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red  disc\r\n\n  a café , at dusk\t\nfog".encode())
    assert read_prompts(file) == ["a red disc", "a café , at dusk", "fog"]


@pytest.mark.parametrize(("content", "why"), [(b"", "has no prompt"), (b" \n\t\n\r\n", "has no prompt"), (b"\xff\xfe\x00d", "not UTF-8")])
def test_files_without_prompts_are_named(tmp_path: Path, content: bytes, why: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^[^\n]*prompts\.txt {'is ' if 'UTF' in why else ''}{why}[^\n]*$"):
        read_prompts(file)
    with pytest.raises(ValueError, match=r"other\.txt is not there"):
        read_prompts(tmp_path / "other.txt")
