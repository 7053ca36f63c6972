"""A connection with an agent on it, opened anew as often as it takes.

A lost connection says nothing about a job: every request is repeated until it is answered.
"""

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from resources.auth import AccessError
from resources.slurm.gateway.answers import LostClaimError, RefusedError, StoppedError
from resources.slurm.gateway.channel import OpenChannel
from resources.slurm.gateway.wire import Wire
from resources.ssh import AuthenticationError, UnreachableError

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 15.0
DENIED_PAUSE, DENIED_PATIENCE = 60.0, 86400.0
"""For a login node that has let this client in and does so no more: somebody may mend that while the job runs."""
T = TypeVar("T")
_Frame = tuple[Mapping[str, Any], bytes]
_Ahead = Callable[[], tuple[Mapping[str, Any], bytes] | None]


def _nothing() -> None:
    """No request."""


class BrokenError(Exception):
    """The connection is lost, or an answer decided nothing: ask again."""


class _DeniedError(BrokenError):
    """There is no way in any more, for as long as nobody does something about it."""


@dataclass
class _Early:
    """A request that was sent ahead, and what has come to it so far."""

    request: Mapping[str, Any]
    data: bytes
    wire: Wire
    ident: int
    frames: deque[_Frame] = field(default_factory=deque)


class Link:
    """Requests and their answers, over whatever connection there is at the moment; for one thread at a time."""

    def __init__(
        self,
        open_channel: OpenChannel,
        stop: threading.Event | None = None,
        on_trouble: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Nothing is opened yet.

        Args:
            open_channel: makes a connection with an agent on it.
            stop: ends waits with StoppedError, when it is set.
            on_trouble: is told of each lost connection, in words.
        """
        self._open_channel = open_channel
        self.stop = stop or threading.Event()
        self._on_trouble = on_trouble
        self.wire: Wire | None = None
        self.claimed: Mapping[str, Any] | None = None
        self._hold = -1
        self._let_in: float | None = None
        self._ahead: _Ahead = _nothing
        self._early: _Early | None = None

    def close(self) -> None:
        """End the connection."""
        if self.wire:
            self.wire.close()
            self.wire = None

    def send_ahead(self, make: _Ahead) -> None:
        """Let the next exchange take along what the one after it will ask for: that costs no round trip then.

        Args:
            make: the request and its data, or None; called once the next exchange's own requests are on their way.
        """
        self._ahead = make

    def ask(self, **request: Any) -> Mapping[str, Any]:
        """The one answer to a request."""
        return self.patiently(lambda: next(self.exchange(request))[1])

    def exchange(
        self, *requests: Mapping[str, Any], data: bytes = b""
    ) -> Iterator[tuple[int, Mapping[str, Any], bytes]]:
        """The answers to some requests, as they come, with which of them they are to; `data` goes behind the last."""
        try:
            wire = self._connect()
            idents, come = self._send(wire, requests, data)
            while True:
                if self.stop.is_set():
                    raise StoppedError
                frame = come.popleft() if come else self._receive(wire)
                if frame is None or frame[0]["id"] not in idents:
                    continue
                if "error" in frame[0]:
                    final = frame[0]["error"] == "refused"
                    raise (RefusedError if final else BrokenError)(frame[0]["text"])
                yield idents.index(frame[0]["id"]), *frame
        except (OSError, EOFError, UnreachableError) as error:
            raise BrokenError(str(error) or type(error).__name__) from error
        except (AccessError, AuthenticationError) as error:
            if isinstance(error, AccessError) and error.temporary:
                raise BrokenError(str(error)) from error
            if self._let_in is None or time.monotonic() - self._let_in > DENIED_PATIENCE:
                raise
            raise _DeniedError(str(error)) from error

    def _send(
        self, wire: Wire, requests: tuple[Mapping[str, Any], ...], data: bytes
    ) -> tuple[list[int], deque[_Frame]]:
        """The requests' numbers, and what has come to them already."""
        early, self._early = self._early, None
        if early and early.wire is wire and (requests, data) == ((early.request,), early.data):
            idents, come = [early.ident], early.frames
        else:
            last = len(requests) - 1
            idents = [wire.send(data if which == last else b"", **request) for which, request in enumerate(requests)]
            come = deque()
        make, self._ahead = self._ahead, _nothing
        ahead = make()
        if ahead:
            request, data = ahead
            self._early = _Early(request, data, wire, wire.send(data, **request))
        return idents, come

    def _receive(self, wire: Wire) -> _Frame | None:
        """The next frame, if one has come; what is to a request that was sent ahead is kept."""
        frame = wire.receive()
        self._let_in = time.monotonic()
        if frame and frame[0]["id"] == self._hold and "held" in frame[0]:
            raise LostClaimError(frame[0]["held"])
        if frame and self._early and frame[0]["id"] == self._early.ident:
            self._early.frames.append(frame)
        return frame

    def _connect(self) -> Wire:
        """The connection; on a new one, what was claimed is held on to first."""
        if self.wire is None:
            self.wire = Wire(self._open_channel())
            self._hold = self.wire.send(do="hold", **self.claimed) if self.claimed else -1
        return self.wire

    def patiently(self, step: Callable[[], T]) -> T:
        """Until it works, is refused, or is stopped; pauses grow while nothing works at all."""
        pause = FIRST_PAUSE
        while True:
            try:
                return step()
            except BrokenError as error:
                if self.wire and self.wire.worked:
                    pause = FIRST_PAUSE
                self.close()
                self._on_trouble(str(error))
                wait = DENIED_PAUSE if isinstance(error, _DeniedError) else pause
            if self.stop.wait(wait * random.uniform(0.5, 1.0)):  # noqa: S311 (jitter)
                raise StoppedError
            pause = min(2 * pause, LONGEST_PAUSE)
