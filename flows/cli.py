"""What every command of flows/ does with a refusal: one line and no traceback."""

import sys
from collections.abc import Callable
from functools import wraps


def one_line_errors(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """Make a command exit with one line, and code 1, for a ValueError or RuntimeError."""

    @wraps(main)
    def run(argv: list[str]) -> None:
        try:
            main(argv)
        except (ValueError, RuntimeError) as error:
            sys.exit(f"cf: {' '.join(str(error).split())}")

    return run
