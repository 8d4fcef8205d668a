"""What the CF_* variables of the environment say. The class, with a sentence for each, is in tasks/params/environment.py.

pydantic is imported when a value is read, so that `cf --help` doesn't pay for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.params.environment import Environment


def read_settings() -> Environment:
    """Read the CF_* variables; ValueError names the first that is malformed."""
    from tasks.params.environment import read_environment

    return read_environment()
