"""Two ways to an agent: over SSH, and as a subprocess for Dagster on the login node itself."""

import os
import select
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from resources.settings import Settings

SOURCE = Path(__file__).with_name("agent.py").read_bytes()
# Reads exactly the source; what follows on stdin stays in the same buffer, for the agent. It has no single quotes, so
# that every login shell takes it between some.
_START = 'import sys; exec(compile(sys.stdin.buffer.read(%d), "agent", "exec"), {"__name__": "__main__"})'
_WINDOW = 2 << 20
"""Bytes under way: paramiko's default, which bounds the memory here and is enough for 80 MB/s at 50 ms."""
_PIECE = 1 << 18


class Channel(Protocol):
    """Bytes to and from an agent that has just been started.

    All methods raise OSError, EOFError or SshError when the connection is lost.
    """

    def read(self, seconds: float) -> bytes:
        """Some bytes; none at the end; raises TimeoutError if nothing comes for so long."""

    def write(self, data: bytes) -> None:
        """Send all of it."""

    def complaint(self) -> str:
        """What came on stderr, for an agent that did not start."""

    def close(self) -> None:
        """End the connection; the agent leaves."""


OpenChannel = Callable[[], Channel]


def ssh_channel(settings: Settings, python: str, refresh: Callable[[Settings], object]) -> OpenChannel:
    """Opens a connection and one channel on it, each time it is called.

    Args:
        settings: of the login node.
        python: interpreter there, 3.6 or later.
        refresh: `ensure_certificate`.
    """

    def open_channel() -> Channel:
        from resources.ssh import connect

        return _SshChannel(connect(settings, refresh), python)

    return open_channel


def local_channel(python: str) -> OpenChannel:
    """Starts the agent as a subprocess, each time it is called."""
    return lambda: _LocalChannel(python)


def _start_code() -> str:
    return _START % len(SOURCE)


class _SshChannel:
    def __init__(self, connection: Any, python: str) -> None:
        self._connection = connection
        try:
            self._channel = connection.transport.open_session(window_size=_WINDOW)
            self._channel.exec_command(f"exec {shlex.quote(python)} -u -c {shlex.quote(_start_code())}")
        except BaseException as error:
            connection.close()
            if isinstance(error, Exception) and not isinstance(error, OSError | EOFError):
                raise OSError(f"no channel: {error}") from error
            raise
        self.write(SOURCE)

    def read(self, seconds: float) -> bytes:
        self._channel.settimeout(seconds)
        return bytes(self._channel.recv(_PIECE))

    def write(self, data: bytes) -> None:
        self._channel.settimeout(None)
        self._channel.sendall(data)

    def complaint(self) -> str:
        said = self._channel.recv_stderr(4096) if self._channel.recv_stderr_ready() else b""
        return bytes(said).decode(errors="replace").strip()

    def close(self) -> None:
        self._connection.close()


class _LocalChannel:
    def __init__(self, python: str) -> None:
        self._process = subprocess.Popen(
            [python, "-u", "-c", _start_code()],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for Dagster, which decides what becomes of the agent
        )
        self.write(SOURCE)

    def read(self, seconds: float) -> bytes:
        assert self._process.stdout
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            raise TimeoutError
        return os.read(self._process.stdout.fileno(), _PIECE)

    def write(self, data: bytes) -> None:
        assert self._process.stdin
        view = memoryview(data)
        while view:
            view = view[self._process.stdin.write(view) :]

    def complaint(self) -> str:
        assert self._process.stderr
        ready = select.select([self._process.stderr], [], [], 0)[0]
        return os.read(self._process.stderr.fileno(), 4096).decode(errors="replace").strip() if ready else ""

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe
            pipe.close()
        deadline = time.monotonic() + 5
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)  # it leaves by itself; a submission under way is finished first, with nobody waiting


__all__ = ["SOURCE", "Channel", "OpenChannel", "local_channel", "ssh_channel"]
