"""A stand-in for the capture of a pass as a CUDA graph, on a CPU: it refuses what a capture would, and replays by running again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# operations that read a tensor's value, or send one of Python's
FORBIDDEN = ("_local_scalar_dense", "nonzero", "equal", "lift_fresh", "masked_select", "unique")


def list_tensors(tree: Any) -> list[torch.Tensor]:
    """List the tensors with elements in nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.numel()]


class FakeCapture(TorchDispatchMode):
    """Mode that refuses waiting for the host, and lists the addresses that operations use but did not make."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = dict[int, torch.Tensor](), set[int]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(function) for name in FORBIDDEN), f"{function} waits for the host"
        self.outside |= {x.untyped_storage().data_ptr() for x in list_tensors((args, kwargs))} - self.inside.keys()
        made = function(*args, **kwargs or {})
        for x in list_tensors(made):  # held, so that no later tensor has the same address
            if x.untyped_storage().data_ptr() not in self.outside:
                self.inside[x.untyped_storage().data_ptr()] = x
        return made

    def list_leaks(self, answer: Any) -> int:
        """Count the tensors made inside that somebody still holds, beside the answer: in a graph's memory they would be overwritten."""
        kept = {x.untyped_storage()._cdata for x in list_tensors(answer)}
        made = [weakref.ref(x.untyped_storage()) for x in self.inside.values() if x.untyped_storage()._cdata not in kept]
        self.inside = {}
        gc.collect()
        return sum(storage() is not None for storage in made)


class FakeRecorder:
    """`record_graph` without a GPU; a replay runs the function again, which must use the addresses of its capture."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.captures += 1
        gc.freeze()  # what is there before a capture can hold none of its tensors, so the search for leaks need not look through it
        with FakeCapture() as capture:
            answer = run()
        assert not capture.list_leaks(answer), "what a capture allocates belongs to its graph"
        gc.unfreeze()
        addresses = capture.outside

        def replay() -> None:
            self.replays += 1
            with FakeCapture() as again:
                new = run()
            assert again.outside <= addresses | {x.untyped_storage().data_ptr() for x in list_tensors(answer)}, "addresses stay"
            for old, now in zip(list_tensors(answer), list_tensors(new), strict=True):
                old.copy_(now)

        return replay, answer
