"""Wait for a condition, never for a time."""

import time
from collections.abc import Callable
from typing import TypeVar

from .errors import SiteError

T = TypeVar("T")


def wait_until(condition: Callable[[], T], what: str, timeout: float = 60.0) -> T:
    """Return the first true value of `condition`.

    It is looked at more rarely, the longer that lasts: twice a second at last. Many tests wait at the same time.

    Raises:
        SiteError: it is not true after `timeout` seconds; the message names `what` was awaited.
    """
    begun = time.monotonic()
    while not (value := condition()):
        waited = time.monotonic() - begun
        if waited > timeout:
            raise SiteError(f"not within {timeout:.0f} s: {what}")
        time.sleep(min(max(0.02, waited / 10), 0.5))
    return value
