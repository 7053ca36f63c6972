"""Waiting for a condition, never for a time."""

import time
from collections.abc import Callable

from .errors import SiteError


def wait_until(condition: Callable[[], object], what: str, timeout: float = 60.0, interval: float = 0.1) -> None:
    """Look every `interval` seconds until `condition` is true; after `timeout` seconds raise SiteError, with `what`."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise SiteError(f"not within {timeout:.0f} s: {what}")
        time.sleep(interval)
