"""The checker of shapes, which every test relies on: a call that differs from those found right is checked, in and out."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from cf_model.model.flow import add_noise
from tests.shapes import check_new_calls, check_shapes

Function = Callable[..., Any]


@check_new_calls
def answer_with(x: Float[Tensor, "B N"], y: Float[Tensor, " B"], call: Function, kind: Literal["a", "b"] = "a") -> Float[Tensor, " B"]:
    return call(x)


def add(x: Tensor) -> Tensor:
    return x.sum(dim=1)


@pytest.mark.parametrize("again", [False, True])
def test_wrong_shapes_are_found_in_a_first_and_in_a_later_call(again: bool) -> None:
    x, y = torch.ones(2, 3), torch.ones(2)
    if again:
        assert torch.equal(answer_with(x, y, add), answer_with(x, y, add))
        answer_with(torch.ones(4, 3), torch.ones(4), add)
    wrong = [(x, torch.ones(4), add), (x[0], y, add), (x.long(), y, add), (x, [1.0, 1.0], add), (x, y, None), (x, y, add, "c")]
    for given in wrong:
        with pytest.raises(TypeCheckError, match="checking the parameters of"):
            answer_with(*given)
    with pytest.raises(TypeCheckError, match="checking the parameters of"):
        answer_with(x, y=y, call=add, kind="c")  # type: ignore[arg-type]
    for call in (lambda x: x, lambda x: add(x).long(), lambda x: None, lambda x: add(x)[:1]):
        with pytest.raises(TypeCheckError, match="checking the return value of"):
            answer_with(x, y, call)


def test_a_call_is_made_once_however_it_is_checked() -> None:
    calls: list[Tensor] = []
    for size in (2, 3):
        for answer in (1, 1, 1.0, 1.0):  # a kind of answer that was not seen with these arguments is checked after the call
            name = check_once(torch.ones(size), lambda x, answer=answer: calls.append(x) or answer)
            assert name == answer
    assert len(calls) == 8


@check_new_calls
def check_once(x: Float[Tensor, " N"], call: Function) -> float:
    return call(x)


def test_fields_of_a_dataclass_are_checked() -> None:
    @dataclass(frozen=True)
    class Pair:
        x: Float[Tensor, " N"]
        y: Float[Tensor, " N"]

    checked = check_shapes(Pair)
    checked(torch.ones(2), torch.ones(2))
    with pytest.raises(TypeCheckError, match="checking the parameters of"):
        checked(torch.ones(2), torch.ones(3))


def test_nothing_that_was_handed_in_or_out_is_kept() -> None:
    x = torch.ones(2, 3)
    answers = [answer_with(x, x[:, 0], call) for call in (add, lambda x: x[:, 0].clone(), add)]
    held = [weakref.ref(one) for one in (x, *answers)]
    del x, answers
    gc.collect()
    assert [one() for one in held] == [None] * 4


def make_adder(y: Tensor) -> Callable[[Tensor], Tensor]:
    @check_new_calls
    def add_to(x: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
        return x + y

    return add_to


def test_a_function_within_another_is_checked_each_time_it_is_made() -> None:
    """By one checker, which keeps nothing of any of them, and with what was around each."""
    y = torch.ones(3)
    held = weakref.ref(y)
    for z in (y, 2 * y, 3 * y):
        assert torch.equal(make_adder(z)(torch.zeros(3)), z)
        with pytest.raises(TypeCheckError, match="checking the parameters of"):
            make_adder(z)(torch.zeros(3, 1))
        with pytest.raises(TypeCheckError, match="checking the return value of"):
            make_adder(torch.ones(2, 3))(torch.zeros(3))
    del y, z
    gc.collect()
    assert held() is None


def test_the_model_is_checked() -> None:
    """Every function of it that is annotated, as the hook has put the checker there."""
    noise = torch.zeros(2, 3, 4, 4, 4)
    add_noise(noise, noise, torch.ones(2))
    with pytest.raises(TypeCheckError, match=r"checking the parameters of cf_model\.model\.flow\.add_noise"):
        add_noise(noise, noise[:, :2], torch.ones(2))
