"""Frames over one connection to an agent: lines of JSON, and raw bytes behind a line whose `size` says so."""

import json
from collections.abc import Iterator, Mapping
from time import monotonic
from typing import Any

from dagster_sbatch.slurm.gateway.agent.server import HELLO
from dagster_sbatch.slurm.gateway.channel import NO_PYTHON, Channel

PING_SECONDS = 15.0
"""Between two pings: the agent leaves a client that is silent for 60 s."""
DEAD_SECONDS = 45.0
"""A connection over which nothing comes for this long is given up."""
READ_SECONDS = 0.5
"""The longest wait for bytes, before `stop` is checked again."""
Frame = tuple[Mapping[str, Any], bytes]


class NoPythonError(Exception):
    """No interpreter starts on the login node; the text says what was tried."""


class Frames:
    """One connection. `send` and `receive` raise OSError, EOFError or SshError when it is lost."""

    def __init__(self, channel: Channel, numbers: Iterator[int]) -> None:
        """Nothing is sent yet.

        Args:
            channel: to an agent that has just been started.
            numbers: of requests; no two of a client have the same, whatever connection they take.
        """
        self._channel, self._numbers = channel, numbers
        self._buffer = bytearray()
        self._greeted, self._banner = False, ""
        self._heard = self._pinged = monotonic()

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def send(self, data: bytes = b"", **request: Any) -> int:
        """Send a request, and bytes behind it; return its number."""
        ident = next(self._numbers)
        size = {"size": len(data)} if data else {}
        begun = monotonic()
        try:
            self._channel.write(json.dumps({**request, **size, "id": ident}).encode() + b"\n" + data)
        except OSError as error:
            if self._greeted or isinstance(error, TimeoutError):
                raise  # otherwise there is no agent: reading shows what came in its place
        if monotonic() - begun > READ_SECONDS:  # the connection is slow, not dead: it has accepted bytes meanwhile
            self._heard = monotonic()
        return ident

    def receive(self) -> Frame | None:
        """Return the next frame, if it comes whole within READ_SECONDS; send pings."""
        now = monotonic()
        if now - self._pinged > PING_SECONDS:
            self._pinged = now
            self.send(do="ping")
        frame = self._cut()
        if frame is None:
            self._fill(now)
            frame = self._cut()
        return frame

    def _fill(self, now: float) -> None:
        try:
            data = self._channel.read(READ_SECONDS)
        except TimeoutError:
            if now - self._heard > DEAD_SECONDS:
                raise OSError(f"nothing has come for {DEAD_SECONDS:.0f} s") from None
            return
        if not data:
            raise EOFError("the connection was closed" if self._greeted else f"no agent: {self._no_agent()}")
        self._heard = now
        self._buffer += data

    def _no_agent(self) -> str:
        """Return why there is no agent: what came on stderr and stdout in place of its greeting."""
        return "\n".join(filter(None, (self._channel.complaint(), self._banner))) or "the connection was closed"

    def _cut(self) -> Frame | None:
        """Take a whole frame off the buffer; what comes before the agent's greeting is a banner's or a profile's."""
        while True:
            end = self._buffer.find(b"\n")
            if end < 0:
                return None
            line = bytes(self._buffer[:end])
            if self._greeted:
                break
            del self._buffer[: end + 1]
            self._banner = line.decode(errors="replace").strip() or self._banner
            self._greeted = HELLO.encode() in line
            if line.startswith(NO_PYTHON.encode()):
                raise NoPythonError(self._no_agent())
        try:
            head = json.loads(line)
        except ValueError as error:
            raise OSError(f"something other than the agent writes to the connection: {line[:100]!r}") from error
        size = head.get("size", 0)
        if len(self._buffer) < end + 1 + size:
            return None
        data = bytes(self._buffer[end + 1 : end + 1 + size])
        del self._buffer[: end + 1 + size]
        return head, data
