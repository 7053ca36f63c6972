"""How far the making of an environment is, for the user."""

import time
from collections.abc import Callable

LOG_SECONDS = 10.0  # between two lines about bytes that were sent


class Progress:
    """Shows the user how far it is: here, as lines of a log."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._first: tuple[float, int] | None = None
        self._logged = 0.0

    def step(self, text: str) -> None:
        """Show what is done now."""
        self._log(f"environment: {text}")

    def sent(self, done: int, total: int) -> None:
        """Show how many bytes of how many are on the supercomputer; as a line at most every ten seconds."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._logged = (now, done), now
        if done < total and now - self._logged < LOG_SECONDS:
            return
        self._logged = now
        since, before = self._first
        rate = (done - before) / max(now - since, 1e-3)
        self._log(f"environment: sent {100 * done // total} % of {total / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s")
