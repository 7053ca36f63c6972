"""The process of a run: what identifies it, also after a reboot and when its number has been used again."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import psutil

from dagster_sbatch.run_launcher.fork_server import PROCESS_TAG

PROC = Path("/proc")
KILL_SECONDS = 5.0
"""Within which a killed process ends, unless it waits for a disk; it executes nothing more in any case."""


@dataclass(frozen=True)
class RunProcess:
    """A process."""

    pid: int  # its number
    begin: str  # when it began: the boot of the machine and clock ticks after it; not on Linux, by the clock

    @classmethod
    def find(cls, pid: int) -> "RunProcess | None":
        """Return the process that has this number now; None if there is none, or if it has ended (a zombie)."""
        try:
            process = psutil.Process(pid)
            return None if process.status() == psutil.STATUS_ZOMBIE else cls(pid, _begin(process))
        except (psutil.Error, FileNotFoundError, ProcessLookupError):  # another user's; or it has just ended
            return None

    @classmethod
    def of(cls, run: dg.DagsterRun) -> "RunProcess | None":
        """Return the process that `ForkingRunLauncher` has forked for a run; None if it has not."""
        run_id, _, process = run.tags.get(PROCESS_TAG, "").partition(" ")
        pid, _, begin = process.partition(" ")
        return cls(int(pid), begin) if run_id == run.run_id else None

    def tags(self, run_id: str) -> dict[str, str]:
        """Return the tags by which `of` finds this process."""
        return {PROCESS_TAG: f"{run_id} {self.pid} {self.begin}"}

    def interrupt(self) -> bool:
        """Send SIGINT to the process; return False if it is gone."""
        return self._send(signal.SIGINT)

    def kill(self) -> None:
        """End the process by SIGKILL, and wait until it has ended."""
        self._send(signal.SIGKILL)
        deadline = time.monotonic() + KILL_SECONDS
        while self.alive and time.monotonic() < deadline:
            time.sleep(0.01)

    def _send(self, number: signal.Signals) -> bool:
        if not self.alive:
            return False
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    @property
    def alive(self) -> bool:
        """Whether the process still exists; another process under its number is not it."""
        return RunProcess.find(self.pid) == self


def _begin(process: psutil.Process) -> str:
    boot = PROC / "sys" / "kernel" / "random" / "boot_id"
    if not boot.exists():
        return str(process.create_time())
    stat = (PROC / str(process.pid) / "stat").read_text(errors="replace")  # another program may have the number now
    return f"{boot.read_text().strip()} {stat.rpartition(')')[2].split()[19]}"  # field 22 of proc_pid_stat(5)
