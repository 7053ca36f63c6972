"""Start and stop daemons on the simulated machines."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import SiteError
from .host import spawn
from .machines import Machine
from .waiting import wait_until

_START_WAIT, _STOP_WAIT = 60.0, 30.0


@dataclass(frozen=True)
class Daemon:
    """A program that runs in the foreground on a machine until it gets SIGTERM.

    Attributes:
        machine: where it runs.
        name: names its pid file and its log.
        command: its command line.
        ready: returns true once it serves.
    """

    machine: Machine
    name: str
    command: Sequence[str]
    ready: Callable[[], bool]

    @property
    def running(self) -> bool:
        """Whether its process lives."""
        pid = self._pid()
        return pid is not None and self.machine.process_alive(pid)

    def launch(self) -> bool:
        """Start it unless it runs, and return whether it was started; do not wait until it serves."""
        if self.running:
            return False
        file = self.machine.pid_file(self.name)
        file.unlink(missing_ok=True)
        keep_pid = ["sh", "-c", 'echo $$ >"$1"; shift; exec "$@"', "sh", str(file)]
        spawn(self.machine.command([*keep_pid, *self.command]), self._output)
        wait_until(lambda: self._pid() is not None, f"start of {self.name}")
        return True

    def start(self) -> None:
        """Start it unless it runs, and wait until it serves."""
        self.launch()
        self.wait_ready()

    def wait_ready(self) -> None:
        """Wait until it serves.

        Raises:
            SiteError: it ended, or does not serve within a minute; the message names what it printed.
        """
        deadline = time.monotonic() + _START_WAIT
        while not self.ready():
            if not self.running:
                raise SiteError(f"{self.name} ended; see {self._output}")
            if time.monotonic() > deadline:
                raise SiteError(f"{self.name} does not serve after {_START_WAIT:.0f} s; see {self._output}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Send it SIGTERM, and wait until it has ended; do nothing if it does not run."""
        pid = self._pid()
        if pid is None or not self.machine.process_alive(pid):
            return
        self.machine.run(["kill", str(pid)], check=False)  # it may have ended meanwhile
        wait_until(lambda: not self.machine.process_alive(pid), f"end of {self.name}", _STOP_WAIT)

    @property
    def _output(self) -> Path:
        """What it prints; Slurm's daemons, MariaDB and munged also have logs of their own, beside it."""
        return self.machine.layout.log / f"{self.name}.out"

    def _pid(self) -> int | None:
        try:
            return int(self.machine.pid_file(self.name).read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None
