"""Wait for a condition, never for a time."""

import time
from collections.abc import Callable

from .errors import SiteError


def wait_until(condition: Callable[[], object], what: str, timeout: float = 60.0, interval: float = 0.1) -> None:
    """Wait until `condition` is true; check it every `interval` seconds.

    Raises:
        SiteError: it is not true after `timeout` seconds; the message names `what` was awaited.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise SiteError(f"not within {timeout:.0f} s: {what}")
        time.sleep(interval)
