"""What is told while an environment is made."""

import time
from collections.abc import Callable
from typing import Protocol

TOLD_SECONDS = 10.0


class Progress(Protocol):
    """Whoever shows how far it is."""

    def step(self, text: str) -> None:
        """What is being done now."""

    def sent(self, done: int, total: int) -> None:
        """So many bytes are there, of so many; those that were there before count."""


class LoggedProgress:
    """For a log: each step, and every ten seconds how much is sent."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._begun: tuple[float, int] | None = None
        self._told = 0.0

    def step(self, text: str) -> None:  # noqa: D102 - see Progress
        self._log(f"environment: {text}")

    def sent(self, done: int, total: int) -> None:  # noqa: D102 - see Progress
        now = time.monotonic()
        if self._begun is None:
            self._begun, self._told = (now, done), now
        if done < total and now - self._told < TOLD_SECONDS:
            return
        self._told = now
        since, first = self._begun
        rate = (done - first) / max(now - since, 1e-3)
        self._log(f"environment: sent {100 * done // total} % of {total / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s")
