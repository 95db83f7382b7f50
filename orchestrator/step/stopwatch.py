"""Measures where the wall time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Wall time of one step by the name of what was waited for. The rest of the step is "other"."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._spent: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a block under a name; blocks don't nest."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - started)

    def add(self, name: str, seconds: float) -> None:
        """Add time measured elsewhere."""
        self._spent[name] = self._spent.get(name, 0.0) + seconds

    def metrics(self) -> dict[str, float]:
        """Seconds by name ("time/<name>_s"), of the whole step ("time/step_s") and of the rest ("time/other_s")."""
        total = time.monotonic() - self._started
        return self.named() | {"time/step_s": total, "time/other_s": max(0.0, total - sum(self._spent.values()))}

    def named(self) -> dict[str, float]:
        """Seconds by name ("time/<name>_s")."""
        return {f"time/{name}_s": seconds for name, seconds in self._spent.items()}
