"""Trees of parameters or metrics by the dotted keys of their nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def list_nodes(tree: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every section and value of a tree with its dotted key, such as ("stage2.steps", 150); a section comes before its values."""
    for name, value in tree.items():
        yield f"{above}{name}", value
        if isinstance(value, Mapping):
            yield from list_nodes(value, f"{above}{name}.")
