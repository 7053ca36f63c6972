"""Running a workload on this machine: in its own process group, with a temporary run directory."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dagster_sbatch.children import child_environment
from dagster_sbatch.run import supervisor
from dagster_sbatch.slurm.gateway.agent.job_record import Stream, cause_of

POLL_SECONDS = 0.05
GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL, when a run is terminated
KILL_SECONDS = 5.0  # for the supervisor to kill what is left
WORK = "work"  # folder of the run directory in which the workload runs, as in a job

_MACHINE = ("VIRTUAL_ENV", "CONDA_PREFIX", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def workload_environment() -> dict[str, str]:
    """Return the variables of this process that a workload gets.

    Its OpenMP threads that wait for others sleep, unless the user says otherwise: other workloads need the CPUs.
    """
    waiting = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    return child_environment(*_MACHINE, PYTHONUNBUFFERED="1", PYTHONUTF8="1", OMP_WAIT_POLICY=waiting)


@dataclass(frozen=True)
class Ended:
    """How a workload ended."""

    exit_code: int  # of its process; negative is the number of the signal that ended it
    seconds: float  # its run time; 0 if that is not known
    cause: str = ""  # why it failed, if its launcher or its container has recorded that; else empty

    @property
    def costs(self) -> dict[str, float]:
        """Metadata of its results."""
        return {"workload_seconds": round(self.seconds, 3)} if self.seconds else {}


class LocalProcess:
    """A workload that runs in the folder WORK of its run directory, and the files that it writes beside that."""

    def __init__(
        self,
        command: list[str],
        environment: Mapping[str, str],
        folder: Path,
        sinks: Mapping[str, Callable[[bytes], None]],
        turn: AbstractContextManager[Any] | None = None,
    ) -> None:
        """Start it, in a process group of its own.

        `environment`: all of the variables that it gets. `sinks`: functions that get the new bytes of the files in it,
        by name, each time within `turn`, if there is one.
        """
        self._folder, self._sinks, self._turn = folder, sinks, turn or nullcontext()
        (folder / WORK).mkdir()
        self._streams = [Stream(folder / name, name, holes=False) for name in sinks]
        with (folder / "stderr").open("ab") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(supervisor.__file__), str(folder / "stdout"), *command],
                env=dict(environment),
                cwd=folder / WORK,
                stdin=subprocess.PIPE,  # never written to: the supervisor reads its end when this process ends
                stdout=subprocess.PIPE,  # of the supervisor, which writes how the workload has ended
                stderr=stderr,
                start_new_session=True,
            )

    def run(self, stop: threading.Event) -> Ended:
        """Follow it to its end; when `stop` is set, it gets SIGTERM and after GRACE_SECONDS SIGKILL."""
        try:
            while self._process.poll() is None and not stop.is_set():
                self._pass_on()
                stop.wait(POLL_SECONDS)
            if stop.is_set():
                self.send(signal.SIGTERM)
                self.wait(GRACE_SECONDS)
        finally:
            ended = self.end()
        return ended

    def _pass_on(self) -> int:
        """Pass on some bytes of each file, a CHUNK of the agent at most; return the number of files that had any."""
        with self._turn:
            return sum(each.pump(lambda data, file, **_: self._sinks[file](data), 1) for each in self._streams)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to its process group."""
        with suppress(ProcessLookupError, PermissionError):  # macOS: all of the group have ended (kill(2), EPERM)
            os.killpg(self._process.pid, number)

    def wait(self, seconds: float) -> None:
        """Wait until it has ended, for at most this many seconds."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def end(self) -> Ended:
        """Kill whatever is left, and return how the workload ended."""
        assert self._process.stdin
        self._process.stdin.close()  # then the supervisor kills all processes that the workload has left
        self.wait(KILL_SECONDS)
        self.send(signal.SIGKILL)
        self._process.wait()
        while self._pass_on():
            pass
        assert self._process.stdout
        with self._process.stdout as report:
            code, _, seconds = report.read().partition(b" ")
        if not seconds:
            return Ended(self._process.returncode, 0.0)
        cause: str = cause_of(str(self._folder)) if int(code) else ""
        return Ended(int(code), float(seconds), cause)
