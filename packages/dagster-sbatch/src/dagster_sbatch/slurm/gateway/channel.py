"""Bytes to and from an agent: over SSH, or through a subprocess where Dagster runs on the login node itself."""

import os
import re
import select
import shlex
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from dagster_sbatch.children import child_environment
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm.gateway.agent.slurm_commands import KEPT
from dagster_sbatch.slurm.gateway.shell import after_login_profile, for_any_shell
from dagster_sbatch.ssh import connect

_MODULES = "disk transfer turn task_states slurm_commands job_record ends streams tasks paths".split()
_MODULES += "run_directories limits usage jobs array_follower follower interpreters building".split()
_MODULES += "releases claims images task_records server".split()
"""Of the agent, each after those that it uses."""
_JOIN = """\
import sys, types
sys.modules["agent"] = types.ModuleType("agent")
for name, text in {texts!r}:
    module = sys.modules["agent." + name] = types.ModuleType("agent." + name)
    module.__package__ = "agent"
    exec(compile(text, "agent/" + name, "exec"), module.__dict__)
serve = module.serve
"""


def _join() -> bytes:
    """Return the agent's modules as one program, compressed with zlib: a new connection takes few packets at once."""
    folder = Path(__file__).with_name("agent")
    texts = [(name, without_comments((folder / f"{name}.py").read_text(encoding="utf-8"))) for name in _MODULES]
    return zlib.compress(_JOIN.format(texts=texts).encode(), 9)


def without_comments(text: str) -> str:
    """Return a module's code without comments and docstrings, two thirds of the bytes. Lines keep their numbers."""
    docstring = re.compile(r'^( *)"""(.*?)"""', re.MULTILINE | re.DOTALL)
    code = docstring.sub(lambda found: f'{found[1]}""' + "\n" * found[2].count("\n"), text)
    return re.sub(r"(^ *|  )#.*$", "", code, flags=re.MULTILINE)


_SOURCE = _join()
# Reads exactly the source; the requests that follow on stdin stay in the same buffer, for the agent.
_START = (
    "import sys, zlib; sys.version_info < (3, 6) and sys.exit('it is Python ' + sys.version.split()[0]); "
    f"source = zlib.decompress(sys.stdin.buffer.read({len(_SOURCE)})); "
    "names = {}; exec(compile(source, 'agent', 'exec'), names); names['serve']()"
)
NO_PYTHON = "gateway-agent: no Python"
"""Begins the line that comes instead of the agent's greeting where none of the interpreters starts."""
# Runs the first interpreter that starts. An agent ends with 0 or by a signal.
_CHOOSE = """\
for each in {pythons}; do
  command -v "$each" >/dev/null 2>&1 || continue
  "$each" -I -S -u -c {start}
  code=$?
  if [ $code = 0 ] || [ $code -gt 128 ]; then exit $code; fi
  echo "$each ended with exit code $code" >&2
done
"""
_WINDOW = 2 << 20
"""Bytes that may be in flight: paramiko's default. It bounds the memory here; it allows 40 MB/s at 50 ms round trip."""
_PIECE = 1 << 18
_WRITE_SECONDS = 45.0
"""For a peer that accepts no bytes any more."""


class Channel(Protocol):
    """Bytes to and from an agent that has just been started.

    All methods raise OSError, EOFError or SshError when the connection is lost.
    """

    def read(self, seconds: float) -> bytes:
        """Return some bytes, none at the end; raise TimeoutError if nothing comes within this time."""

    def write(self, data: bytes) -> None:
        """Send all bytes."""

    def complaint(self) -> str:
        """Return what came on stderr: why an agent did not start."""

    def close(self) -> None:
        """End the connection; the agent leaves."""


OpenChannel = Callable[[], Channel]


def choose_channel(
    settings: Settings,
    pythons: Sequence[str],
    refresh: Callable[[Settings], object],
    host_authorities: Sequence[str] = (),
    setup: Sequence[str] = (),
) -> OpenChannel:
    """Return what opens a channel to a new agent: SSH, or a subprocess if this machine is the login node.

    Args:
        settings: of the login node.
        pythons: interpreters there to try, the best first; 3.6 or later.
        refresh: `ensure_certificate`.
        host_authorities: of the site.
        setup: the site's setup commands, for the agent and for what it starts.
    """
    if settings.on_login_node:
        return lambda: _LocalChannel(setup)
    return lambda: _SshChannel(connect(settings, refresh, host_authorities), _start(pythons, setup))


def _start(pythons: Sequence[str], setup: Sequence[str]) -> str:
    """Return the script of /bin/sh that starts an agent.

    Login profiles can be slow. One is read for the setup commands, and where Slurm or Python are not found without it.
    """
    choose = _CHOOSE.format(pythons=shlex.join(pythons), start=shlex.quote(_START))
    none = f"{NO_PYTHON}: none of {', '.join(pythons)} starts on"
    last = f'{choose}echo; echo {shlex.quote(none)} "$(uname -n)"'
    first = "" if setup else f"if command -v sbatch >/dev/null 2>&1; then\n{choose}fi\n"
    return first + after_login_profile(setup, last)


class _SshChannel:
    def __init__(self, connection: Any, script: str) -> None:
        self._connection = connection
        try:
            self._channel = connection.transport.open_session(window_size=_WINDOW)
            self._channel.exec_command(for_any_shell(script))
            with suppress(OSError):  # the shell has ended: reading shows why
                self.write(_SOURCE)
        except BaseException as error:
            connection.close()
            if isinstance(error, Exception) and not isinstance(error, OSError | EOFError):
                raise OSError(f"no channel: {error}") from error
            raise

    def read(self, seconds: float) -> bytes:
        self._channel.settimeout(seconds)
        return bytes(self._channel.recv(_PIECE))

    def write(self, data: bytes) -> None:
        self._channel.settimeout(_WRITE_SECONDS)
        self._channel.sendall(data)

    def complaint(self) -> str:
        said = self._channel.recv_stderr(4096) if self._channel.recv_stderr_ready() else b""
        return bytes(said).decode(errors="replace").strip()

    def close(self) -> None:
        self._connection.close()


class _LocalChannel:
    def __init__(self, setup: Sequence[str]) -> None:
        agent = [sys.executable, "-I", "-S", "-u", "-c", _START]
        script = after_login_profile(setup, f"exec {shlex.join(agent)}")
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", script] if setup else agent,
            bufsize=0,
            env=child_environment(*KEPT),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for Dagster, which ends the agent itself
        )
        self.write(_SOURCE)

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
            time.sleep(0.01)  # it ends by itself, after a submission that it has begun


__all__ = ["Channel", "OpenChannel", "choose_channel"]
