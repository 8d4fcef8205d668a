"""Progress of a stage on stderr: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

PLAIN_SECONDS = 10  # between two lines of progress where there is no terminal


class Progress:
    """A count with its rate and the time left; `hidden` shows nothing."""

    def __init__(self, name: str, total: int, unit: str, start: int, *, hidden: bool = False) -> None:
        self.name, self.total, self.unit, self.start, self.done = name, total, unit, start, start
        self.began = self.printed = time.monotonic()
        self.values: dict[str, float] = {}
        self.bar: Any = None
        self.closed = hidden
        if sys.stderr.isatty() and not hidden:
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=start, unit=f" {unit}", desc=name, dynamic_ncols=True, smoothing=0.1)

    def update(self, n: int = 1, **values: float) -> None:
        """Count `n` more units, and show the latest values beside the count."""
        self.done += n
        self.values = values
        if self.bar is not None:
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
            self.bar.update(n)
        elif time.monotonic() - self.printed >= PLAIN_SECONDS and not self.closed:
            self._print_line()
        if self.done >= self.total:
            self.close()

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        if self.bar is not None:
            self.bar.close()
        else:
            self._print_line()

    def _print_line(self) -> None:
        self.printed = time.monotonic()
        seconds = self.printed - self.began
        rate = (self.done - self.start) / seconds if seconds else 0.0
        parts = [f"{self.name}: {self.done} of {self.total} {self.unit}s"]
        if rate:
            left = (self.total - self.done) / rate
            parts += [f"{rate:.3g} a second", f"{left:.0f} s left" if self.done < self.total else f"in {seconds:.0f} s"]
        parts += [f"{name} {value:.4g}" for name, value in self.values.items()]
        print(", ".join(parts), file=sys.stderr, flush=True)
