"""What every command of flows/ does with an error: one line, and no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps


def one_line_errors(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """A command: what it refuses is one line, and no traceback."""

    @wraps(main)
    def told(argv: list[str]) -> None:
        try:
            main(argv)
        except (ValueError, RuntimeError) as error:
            sys.exit(f"cf: {' '.join(str(error).split())}")

    return told
