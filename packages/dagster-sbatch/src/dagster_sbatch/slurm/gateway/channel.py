"""A connection to an agent: over SSH, or through a subprocess where Dagster runs on the login node itself."""

import json
import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from time import monotonic
from typing import Any

from dagster_sbatch.children import child_environment
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm.gateway import programs
from dagster_sbatch.slurm.gateway.agent.server import HELLO
from dagster_sbatch.slurm.gateway.agent.slurm_commands import KEPT
from dagster_sbatch.ssh import connect

_WINDOW = 2 << 20
"""Bytes that may be in flight: paramiko's default. It bounds the memory here; it allows 40 MB/s at 50 ms round trip."""
_PIECE = 1 << 18
_WRITE_SECONDS = 45.0  # for a peer that accepts no bytes any more
PING_SECONDS = 15.0  # between two pings: the agent leaves a client that is silent for 60 s
DEAD_SECONDS = 45.0  # a connection over which nothing comes for this long is given up
# Seconds to wait for a login shell whose profile hangs: such a shell stays on the login node, and each try adds one.
SHELL_SECONDS = 600.0
HANGS = "The login node answers, but its login shell has not started the agent yet. Find out what its profile waits "
HANGS += "for:\n  bash -lc true"
ENDS = "If that does not say why, check whether the login profile there exits, or starts another shell (`exec zsh`):\n"
ENDS += "  bash -lc 'echo it works'"
READ_SECONDS = 0.5  # the longest wait for bytes, before `stop` is checked again
Frame = tuple[Mapping[str, Any], bytes]


class NoPythonError(Exception):
    """No interpreter starts on the login node; the text says what was tried."""


class Channel(ABC):
    """A connection to an agent that has just been started: lines of JSON, and raw bytes behind a line with a `size`.

    All methods raise OSError or EOFError when it is lost.
    """

    def __init__(self) -> None:
        self._numbers = count(1)
        self._buffer = bytearray()
        self._greeted, self._banner = False, ""
        self._begun = self._heard = self._pinged = monotonic()
        self.on_trouble: Callable[[str], None] = lambda _: None  # gets the text of an error that may pass by itself

    def send(self, data: bytes = b"", **request: Any) -> int:
        """Send a request, and bytes behind it; return its number."""
        ident = next(self._numbers)
        size = {"size": len(data)} if data else {}
        begun = monotonic()
        try:
            self._write(json.dumps({**request, **size, "id": ident}).encode() + b"\n" + data)
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
            self.send(do="server.ping")
        frame = self._cut()
        if frame is None:
            self._fill(now)
            frame = self._cut()
        return frame

    def _fill(self, now: float) -> None:
        try:
            data = self._read(READ_SECONDS)
        except TimeoutError:
            if now - self._heard > DEAD_SECONDS:
                silence = f"no answer for {DEAD_SECONDS:.0f} s\n{self._no_agent()}".strip()
                if self._greeted or now - self._begun > SHELL_SECONDS or not self._is_alive():
                    raise OSError(silence) from None
                self._heard = now
                self.on_trouble(f"{silence}\n{HANGS}")
            return
        if not data:
            closed = "the connection was closed"
            raise EOFError(closed if self._greeted else f"no agent: {self._no_agent() or closed}\n{ENDS}")
        self._heard = now
        self._buffer += data

    def _no_agent(self) -> str:
        """Return why there is no agent: what came on stderr and stdout; empty if its greeting came."""
        return "" if self._greeted else "\n".join(filter(None, (self._complaint(), self._banner)))

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
            if line.startswith(programs.NO_PYTHON.encode()):
                raise NoPythonError(self._no_agent())
        head = None
        with suppress(ValueError):
            head = json.loads(line)
        if not isinstance(head, dict) or "id" not in head:
            raise OSError(f"something other than the agent writes to the connection: {line[:100]!r}")
        size = head.get("size", 0)
        if len(self._buffer) < end + 1 + size:
            return None
        data = bytes(self._buffer[end + 1 : end + 1 + size])
        del self._buffer[: end + 1 + size]
        return head, data

    @abstractmethod
    def _read(self, seconds: float) -> bytes:
        """Return some bytes, none at the end; raise TimeoutError if nothing comes within this time."""

    @abstractmethod
    def _write(self, data: bytes) -> None:
        """Send all bytes."""

    def _is_alive(self) -> bool:
        """Return whether the login node answers, although the agent does not."""
        return False

    @abstractmethod
    def _complaint(self) -> str:
        """Return what came on stderr: why an agent did not start."""

    @abstractmethod
    def close(self) -> None:
        """End the connection; the agent leaves."""


OpenChannel = Callable[[], Channel]


@contextmanager
def _lost(where: str = "") -> Iterator[None]:
    """Raise OSError with a text for a connection that is lost: paramiko has other errors, too, and some without one."""
    from paramiko import SSHException

    from dagster_sbatch.ssh.connection import text_of

    try:
        yield
    except (OSError, EOFError, SSHException) as error:
        kind = TimeoutError if isinstance(error, TimeoutError) else OSError
        raise kind(f"{where}{text_of(error)}") from error


class _SshChannel(Channel):
    def __init__(self, connection: Any, script: str) -> None:
        super().__init__()
        self._connection = connection
        try:
            with _lost("no channel: "):
                self._channel = connection.transport.open_session(window_size=_WINDOW)
                with self._closing_in_time():
                    self._channel.exec_command(programs.for_any_shell(script))
            with suppress(OSError):  # the shell has ended: reading shows why
                self._write(programs.SOURCE)
        except BaseException:
            connection.close()
            raise

    @contextmanager
    def _closing_in_time(self) -> Iterator[None]:
        """Close the connection if the server does not answer in time: paramiko itself waits for ever."""
        too_late = threading.Event()

        def give_up() -> None:
            too_late.set()
            self._connection.close()

        timer = threading.Timer(DEAD_SECONDS, give_up)
        timer.start()
        try:
            yield
        except Exception as error:
            if too_late.is_set():
                raise TimeoutError(f"no answer within {DEAD_SECONDS:.0f} s") from error
            raise
        finally:
            timer.cancel()

    def _is_alive(self) -> bool:
        transport = self._connection.transport
        with _lost(), self._closing_in_time():
            transport.global_request("keepalive@openssh.com")  # a server refuses it: that is an answer, too
        return bool(transport.is_active())

    def _read(self, seconds: float) -> bytes:
        self._channel.settimeout(seconds)
        with _lost():
            return bytes(self._channel.recv(_PIECE))

    def _write(self, data: bytes) -> None:
        self._channel.settimeout(_WRITE_SECONDS)
        with _lost():
            self._channel.sendall(data)

    def _complaint(self) -> str:
        said = self._channel.recv_stderr(4096) if self._channel.recv_stderr_ready() else b""
        return bytes(said).decode(errors="replace").strip()

    def close(self) -> None:
        self._connection.close()


class _LocalChannel(Channel):
    def __init__(self, setup: Sequence[str]) -> None:
        super().__init__()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (unlike a pipe, it is never full)
        agent = [sys.executable, *"-I -S -u -X utf8 -c".split(), programs.START]
        script = programs.after_login_profile(setup, f"exec {shlex.join(agent)}")
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", script] if setup else agent,
            bufsize=0,
            env=child_environment(*KEPT),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,  # Ctrl-C is for Dagster, which ends the agent itself
        )
        assert self._process.stdin and self._process.stdout
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        os.set_blocking(self._stdin.fileno(), False)
        with suppress(OSError):  # the shell has ended: reading shows why
            self._write(programs.SOURCE)

    def _read(self, seconds: float) -> bytes:
        if not select.select([self._stdout], [], [], seconds)[0]:
            raise TimeoutError
        return os.read(self._stdout.fileno(), _PIECE)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            if not select.select([], [self._stdin], [], _WRITE_SECONDS)[1]:
                raise TimeoutError(f"the agent has accepted nothing for {_WRITE_SECONDS:.0f} s")
            view = view[os.write(self._stdin.fileno(), view) :]

    def _is_alive(self) -> bool:
        return self._process.poll() is None

    def _complaint(self) -> str:
        return os.pread(self._stderr.fileno(), 4096, 0).decode(errors="replace").strip()

    def close(self) -> None:
        for file in (self._stdin, self._stdout, self._stderr):
            file.close()
        try:
            self._process.wait(5)  # it ends by itself, after a submission that it has begun
        except subprocess.TimeoutExpired:
            if not self._greeted:  # the login profile hangs
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()


def choose_channel(
    settings: Settings,
    pythons: Sequence[str],
    refresh: Callable[[Settings], object],
    host_authorities: Sequence[str] = (),
    setup: Sequence[str] = (),
) -> OpenChannel:
    """Return what opens a channel to a new agent: SSH, or a subprocess if this machine is the login node.

    `pythons`: interpreters there to try, the best first; 3.6 or later. `setup`: the site's setup commands, for the
    agent and for what it starts.
    """
    if settings.on_login_node:
        return lambda: _LocalChannel(setup)
    return lambda: _SshChannel(connect(settings, refresh, host_authorities), programs.start_agent(pythons, setup))
