"""Numbers of things in sentences for people."""


def count_things(number: int, thing: str) -> str:
    """Return a number and its noun as a person says them: `1 run`, `2 runs`, `3 processes`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}{'es' if thing.endswith('s') else 's'}"
