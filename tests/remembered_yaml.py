"""YAML that was read before. The reader in Python takes a quarter of a second for a profile, and hundreds of tests read one of five."""

from __future__ import annotations

import pickle
from typing import Any

from ruamel.yaml import YAML

TREES: dict[str, bytes] = {}  # text -> its tree, of which every reader gets one of its own


class RememberedYAML(YAML):
    """The safe reader of params.yaml, which reads a text once."""

    def load(self, stream: Any) -> Any:
        if not isinstance(stream, str):
            return super().load(stream)
        if stream not in TREES:
            TREES[stream] = pickle.dumps(super().load(stream))
        return pickle.loads(TREES[stream])
