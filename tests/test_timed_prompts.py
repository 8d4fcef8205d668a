"""Lines of a prompt file that hold several prompts: LongLive's and Infinity-RoPE's notations."""

from __future__ import annotations

import pytest

from cf_model.timed_prompts import split_timed_prompts


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a red disc over hills", [(0.0, "a red disc over hills")]),
        ("a sign that says [5s] and | more", [(0.0, "a sign that says [5s] and | more")]),
        ("a[5s] | b[10s]", [(0.0, "a"), (5.0, "b")]),
        ("a red disc [2.5s]|a blue disc [4 s]| fog", [(0.0, "a red disc"), (2.5, "a blue disc"), (6.5, "fog")]),
        ('{"prompts": ["a", "b", "c"]}', [(0.0, "a"), (10.0, "b"), (20.0, "c")]),
        ('{"prompts": ["a"], "id": 7}', [(0.0, "a")]),
    ],
)
def test_each_notation(line: str, expected: list[tuple[float, str]]) -> None:
    assert split_timed_prompts(line, 30.0) == expected


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a[5s] | b | c[5s]", "'b' says not how long it lasts; write it as in"),
        ("a[5s] | ", "'' says not how long it lasts"),
        ("[5s] | b", r"'\[5s\]' says not how long it lasts"),
        ("a | b[5s]", "'a' says not how long it lasts"),
        ('{"prompts": []}', r'its prompts are \[\]; write {"prompts":'),
        ('{"prompt": "a"}', "its prompts are None"),
        ('{"prompts": ["a", 5]}', "its prompts are"),
        ('{"prompts": ["a"', "begins like JSON and is none"),
    ],
)
def test_a_line_that_begins_like_one_and_is_none_is_refused(line: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        split_timed_prompts(line, 30.0)
