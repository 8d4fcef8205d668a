"""infra/compose.yaml as Docker would read it, far enough for tests: its variables filled in, its anchors merged."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).parents[2] / "infra/compose.yaml"
SECRETS = {
    "POSTGRES_PASSWORD": "plantedforpostgres",
    "PREFECT_AUTH": "cf:planted-for-prefect",
    "STORE_KEY": "PLANTEDKEY",
    "STORE_SECRET": "planted-for-the-store",
    "CF_REPOSITORY": "/srv/git/project",
}


class Missing(Exception):
    """What Docker would say instead of starting anything."""


def filled(text: str, given: Mapping[str, str]) -> str:
    def value(found: re.Match[str]) -> str:
        name, how, rest = found.groups()
        if given.get(name):
            return given[name]
        if how == ":?":
            raise Missing(f"{name} {rest}")
        return rest or ""

    return re.sub(r"\$\{(\w+)(?:(:-|:\?)([^}]*))?\}", value, text)


def compose(**given: str) -> dict[str, Any]:
    whole = yaml.safe_load(filled(FILE.read_text(), SECRETS | given))
    return {key: value for key, value in whole.items() if not key.startswith("x-")}
