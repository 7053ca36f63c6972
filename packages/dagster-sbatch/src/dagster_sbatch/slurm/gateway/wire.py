"""Frames over a channel to an agent: a line of JSON, and raw bytes behind it where it says so."""

import json
import time
from collections.abc import Mapping
from typing import Any

from dagster_sbatch.slurm.gateway.channel import NO_PYTHON, Channel

HELLO = "gateway-agent 1"
BEAT_SECONDS = 15.0
"""A ping so often, both ways on the clock: the agent leaves a client that is silent for 60 s."""
DEAD_SECONDS = 45.0
"""A connection on which nothing comes for so long is given up."""
LOOK_SECONDS = 0.5
"""How often a wait looks whether it is to stop."""


class NoPythonError(Exception):
    """No interpreter starts on the login node; the text says what was tried."""


class Wire:
    """One connection with an agent on it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._buffer = bytearray()
        self._ident = 0
        self._greeted = False
        self._said = ""
        self._heard = self._beaten = time.monotonic()

    def close(self) -> None:
        """End it."""
        self._channel.close()

    def send(self, data: bytes = b"", **request: Any) -> int:
        """Send a request, and bytes behind it; its number."""
        self._ident += 1
        size = {"size": len(data)} if data else {}
        begun = time.monotonic()
        try:
            self._channel.write(json.dumps({**request, **size, "id": self._ident}).encode() + b"\n" + data)
        except OSError as error:
            if self._greeted or isinstance(error, TimeoutError):
                raise  # otherwise there is no agent: what has come instead is told when it is read
        if time.monotonic() - begun > LOOK_SECONDS:  # a line that is slow, not dead: it has taken something meanwhile
            self._heard = time.monotonic()
        return self._ident

    def receive(self) -> tuple[Mapping[str, Any], bytes] | None:
        """The next frame; None if it has not come whole within LOOK_SECONDS."""
        now = time.monotonic()
        if now - self._beaten > BEAT_SECONDS:
            self._beaten = now
            self.send(do="ping")
        frame = self._cut()
        if frame is None:
            self._fill(now)
            frame = self._cut()
        return frame

    def _fill(self, now: float) -> None:
        try:
            data = self._channel.read(LOOK_SECONDS)
        except TimeoutError:
            if now - self._heard > DEAD_SECONDS:
                raise OSError(f"nothing has come for {DEAD_SECONDS:.0f} s") from None
            return
        if not data:
            raise EOFError("the connection was closed" if self._greeted else f"no agent: {self._no_agent()}")
        self._heard = now
        self._buffer += data

    def _no_agent(self) -> str:
        """Why there is none: what has come instead of its greeting, on stderr and on stdout."""
        return "\n".join(filter(None, (self._channel.complaint(), self._said))) or "the connection was closed"

    def _cut(self) -> tuple[Mapping[str, Any], bytes] | None:
        """Take a whole frame off the buffer; what comes before the agent's greeting is a banner's or a profile's."""
        while True:
            end = self._buffer.find(b"\n")
            if end < 0:
                return None
            line = bytes(self._buffer[:end])
            if self._greeted:
                break
            del self._buffer[: end + 1]
            self._said = line.decode(errors="replace").strip() or self._said
            self._greeted = HELLO.encode() in line
            if line.startswith(NO_PYTHON.encode()):
                raise NoPythonError(self._no_agent())
        try:
            head = json.loads(line)
        except ValueError as error:
            raise OSError(f"something else than the agent writes to the connection: {line[:100]!r}") from error
        size = head.get("size", 0)
        if len(self._buffer) < end + 1 + size:
            return None
        data = bytes(self._buffer[end + 1 : end + 1 + size])
        del self._buffer[: end + 1 + size]
        return head, data
