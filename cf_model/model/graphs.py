"""Passes as CUDA graphs (`compute.graphs`): launched at once, thousands of kernels by one call, over a store whose slots stay.

A store's addresses do not change while a video goes on, so a pass that was captured once can be replayed for every chunk that lies in
the same slots; a full ring has one graph a place. What changes between passes, latents and level, is copied into tensors of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .key_values import LayerKeyValues

Answer = tuple[Tensor, LayerKeyValues]  # the velocity of a pass, and its keys and values where they are wanted


def record_graph(run: Callable[[], Answer]) -> tuple[Callable[[], None], Answer]:
    """Capture what a function launches as a CUDA graph. Returns what launches it again, and the answer, which is then written anew."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer = run()
    return graph.replay, answer


@dataclass(eq=False)
class RecordedPass:
    """A captured pass, the tensors that it reads latents and level from, and those that it writes its answer to."""

    given: tuple[Tensor, ...]
    replay: Callable[[], None]
    answer: Answer


class PassGraphs:
    """The recorded passes over one store. A pass of a kind is run as it is first, which warms up, then captured, then replayed."""

    def __init__(self) -> None:
        self._passes = dict[Hashable, RecordedPass | None]()  # None: such a pass was run once
        self._owners: tuple[Any, ...] = ()

    def run(self, kind: Hashable, owners: tuple[Any, ...], given: tuple[Tensor, ...], run: Callable[..., Answer]) -> Answer:
        """Return what `run` gives for these tensors, by a graph if there is one of this kind.

        `owners` are what all graphs depend on besides (the prompt, the weights' copies): of others the graphs are forgotten.
        """
        if len(owners) != len(self._owners) or any(new is not old for new, old in zip(owners, self._owners, strict=True)):
            self._passes, self._owners = {}, owners
        if kind not in self._passes:
            # as it is: kernels are loaded and caches filled, which a capture must not do
            self._passes[kind] = None
            return run(*given)
        recorded = self._passes[kind]
        if recorded is None:
            # a capture launches nothing, so its first replay is this pass
            copies = tuple(tensor.clone() for tensor in given)
            recorded = self._passes[kind] = RecordedPass(copies, *record_graph(lambda: run(*copies)))
        for static, tensor in zip(recorded.given, given, strict=True):
            static.copy_(tensor)
        recorded.replay()
        # Copied out, because the next replay writes over the answer, and a memory keeps keys and values for long.
        velocity, captured = recorded.answer
        return velocity.clone(), {layer: (k.clone(), v.clone()) for layer, (k, v) in captured.items()}
