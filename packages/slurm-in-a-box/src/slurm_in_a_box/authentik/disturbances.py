"""Faults of the stand-in that a test can inject."""

import threading
from dataclasses import dataclass
from typing import Literal


@dataclass
class Disturbance:
    """What goes wrong with the requests that match; a request that matches several gets the first.

    Attributes:
        kind: `slow` waits before it does anything; `late` does it at once but answers late; `error` does nothing and
            answers with `status`; `lost` does it and closes the connection without an answer.
        seconds: wait of `slow` and `late`.
        status: HTTP status of `error`.
        method: only requests of this method; all when empty.
        path: only requests whose path contains this.
        times: how many requests it applies to before it ends; 0 for all.
    """

    kind: Literal["slow", "late", "error", "lost"]
    seconds: float = 0.0
    status: int = 503
    method: str = ""
    path: str = ""
    times: int = 0

    def matches(self, method: str, path: str) -> bool:
        """Whether it applies to a request."""
        return self.path in path and self.method in ("", method)


class Disturbances:
    """The active disturbances; safe for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active: list[Disturbance] = []

    def add(self, disturbance: Disturbance) -> None:
        """Add one."""
        with self._lock:
            self._active.append(disturbance)

    def clear(self) -> None:
        """End all of them."""
        with self._lock:
            self._active.clear()

    def take(self, method: str, path: str) -> Disturbance | None:
        """Return the first one that matches a request, and count the request."""
        with self._lock:
            found = next((active for active in self._active if active.matches(method, path)), None)
            if found is not None and found.times:
                found.times -= 1
                if not found.times:
                    self._active.remove(found)
            return found
