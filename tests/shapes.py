"""The checker of shapes: jaxtyping's annotations, enforced by beartype, for what a function has not been seen with before.

jaxtyping decorates every function as it is imported and checks every call, which doubles the time of small models. Here a function is
decorated when it is called first, and a call is checked in full if its arguments or its answer differ, in type, shape, dtype, text or
structure, from those of every call that was found right. What the annotations say depends on nothing else, so nothing is missed.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from types import CellType, FunctionType
from typing import Any
from unittest.mock import patch

import jaxtyping
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep3119Exception
from jaxtyping import _import_hook

CHECKED = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float too, as for mypy
jaxtyped = jaxtyping.jaxtyped
MOST = 1000  # kinds of calls that are remembered of a function; beyond them each call is checked
LONGEST = 16  # texts up to this length, which a Literal may ask for, and lists, of which beartype looks at one item, count as they are


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, but for functions that take a Protocol: those it can only check when the protocol is marked for it."""
    try:
        return CHECKED(function)
    except BeartypeDecorHintPep3119Exception:
        return function


def is_array(kind: type) -> bool:
    """Tell tensors and arrays from all else, without torch, which whoever only hands tests out need not import."""
    return hasattr(kind, "shape") and hasattr(kind, "dtype")


def describe_value(value: Any) -> Any:
    """Return what of a value an annotation can ask about, for a set."""
    kind = type(value)
    describe = DESCRIBERS[kind] if kind in DESCRIBERS else DESCRIBERS.setdefault(kind, choose_describer(kind))
    return kind if describe is None else describe(value)


DESCRIBERS: dict[type, Callable[[Any], Any] | None] = {}  # by the kind of a value; None where the kind says all


def choose_describer(kind: type) -> Callable[[Any], Any] | None:
    """Return how values of a kind are described; None for numbers and for objects of a class."""
    if is_array(kind):
        return lambda value: (kind, value.dtype, value.shape)
    if kind is str:
        return lambda value: value if len(value) <= LONGEST else kind
    if issubclass(kind, tuple | list):
        return describe_sequence
    if issubclass(kind, dict):
        return lambda value: (kind, *((describe_value(key), describe_value(item)) for key, item in list(value.items())[:LONGEST]))
    return (lambda value: value) if issubclass(kind, type) else None


def describe_sequence(value: Any) -> Any:
    some = value if len(value) <= LONGEST else (*value[:LONGEST], value[-1])
    return type(value), len(value) == 0, *map(describe_value, some)


class Checker:
    """What was found right of one piece of code, and how its other calls are checked."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.right: set[Any] = set()  # kinds of arguments, and of arguments with an answer
        self.given = threading.local()
        self.code = function.__code__  # held, so that no other code has its place in memory
        self.pattern = strip_closure(function)

    @functools.cached_property
    def decorated(self) -> Callable[..., Any]:
        """Call `given.call`, with all checks."""

        def call_given(*args: Any, **kwargs: Any) -> Any:
            return given.call(*args, **kwargs)

        given, pattern = self.given, self.pattern
        # with the globals of the function, where the names in its annotations are
        alike = FunctionType(call_given.__code__, pattern.__globals__, pattern.__name__, None, call_given.__closure__)
        return jaxtyped(functools.update_wrapper(alike, pattern), typechecker=check)


CHECKERS: dict[int, Checker] = {}  # by the place of the code in memory, because equal code can stand in two files


def strip_closure(function: Callable[..., Any]) -> Any:
    """Return a function with the same code and annotations that holds nothing of the call in which it was made."""
    cells = tuple(CellType() for _ in function.__closure__ or ())
    bare = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells or None)
    bare.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(bare, function)
    del bare.__wrapped__  # type: ignore[attr-defined]
    return bare


def find_checker(function: Callable[..., Any]) -> Checker:
    """Return the checker of a function's code, which all functions share that one piece of code made: a function within another is made
    at each call of the other, and to decorate it anew each time takes milliseconds."""
    place = id(function.__code__)
    if place not in CHECKERS:
        CHECKERS[place] = Checker(function)
    return CHECKERS[place]


def check_new_calls(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that a call is checked if none of its kind was found right before."""
    if not function.__annotations__:
        return function
    checker = find_checker(function)
    right, given = checker.right, checker.given

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        asked = tuple(map(describe_value, args))
        if kwargs:
            asked += tuple((key, describe_value(value)) for key, value in kwargs.items())
        if asked in right:
            answer = function(*args, **kwargs)
            if (asked, describe_value(answer)) in right:
                return answer
            given.call = lambda *_, **__: answer
        else:
            given.call = function
        try:
            answer = checker.decorated(*args, **kwargs)
        finally:
            given.call = None  # or it would hold the answer
        if len(right) < 2 * MOST:
            right.update((asked, (asked, describe_value(answer))))
        return answer

    return wrapped


def check_shapes(thing: Any = None, *, typechecker: Any = None) -> Any:
    """Take the place of `jaxtyping.jaxtyped`, which the import hook puts next to every function, before other decorators, and class."""
    if thing is None:
        return check_shapes
    if isinstance(thing, type):
        if dataclasses.is_dataclass(thing) and "__init__" in vars(thing) and not hasattr(thing.__init__, "__wrapped__"):
            thing.__init__ = check_new_calls(thing.__init__)  # type: ignore[method-assign]
        return thing
    return check_new_calls(thing)


class ModuleLoader(_import_hook._JaxtypingLoader):
    """jaxtyping's, whose name for compiled files holds for a module's own file only, and not while the module is run: what it imports
    then, which may be the first import of torch and diffusers, would be compiled anew."""

    def get_code(self, fullname: str) -> Any:
        name = functools.partial(_import_hook._optimized_cache_from_source, self._typechecker.get_hash())
        with patch("importlib._bootstrap_external.cache_from_source", name):
            return super().get_code(fullname)

    exec_module = SourceFileLoader.exec_module


def check_package(name: str) -> None:
    """Check the shapes of a package that is not imported yet."""
    jaxtyping.jaxtyped = check_shapes
    _import_hook._JaxtypingLoader = ModuleLoader
    jaxtyping.install_import_hook(name, "shapes.check")
