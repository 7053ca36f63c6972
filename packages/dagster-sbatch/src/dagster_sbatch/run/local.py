"""Running a workload on this machine: in its own process group, with a temporary run directory."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dagster_sbatch.children import child_environment
from dagster_sbatch.run import supervisor
from dagster_sbatch.slurm.gateway import MESSAGES

POLL_SECONDS = 0.05
GRACE_SECONDS = 10.0
"""Between SIGTERM and SIGKILL, when a run is terminated."""
KILL_SECONDS = 5.0
"""For the supervisor to kill what is left."""
CHUNK = 1 << 20

_MACHINE = ("VIRTUAL_ENV", "CONDA_PREFIX", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def workload_environment() -> dict[str, str]:
    """Return the variables of this process that a workload gets."""
    return child_environment(*_MACHINE, PYTHONUNBUFFERED="1")


class RunDirectory:
    """Paths of the files of one run: context and checks, and what it writes: messages, output, its end and cause."""

    def __init__(self, path: Path) -> None:
        """`path`: an empty folder that exists; the workload runs in it."""
        self.path = path
        self.context = path / "context.json"
        self.checks = path / "checks.json"
        self.messages = path / MESSAGES
        self.stdout = path / "stdout"
        self.stderr = path / "stderr"
        self.end = path / "end"
        self.cause = path / "cause"


@dataclass(frozen=True)
class Ended:
    """How a workload ended.

    Attributes:
        exit_code: of its process; negative is the number of the signal that ended it.
        seconds: its run time; 0 if that is not known.
        cause: why it failed, if something beside the workload knows more than its exit code; else empty.
    """

    exit_code: int
    seconds: float
    cause: str = ""


def temporary_run_directory() -> "tempfile.TemporaryDirectory[str]":
    """Make a private folder (mode 0700) that is removed at the end: Dagster has all results by then."""
    return tempfile.TemporaryDirectory(prefix="workload-", ignore_cleanup_errors=True)


class LocalProcess:
    """A workload that runs in its run directory, and the files that it writes."""

    def __init__(
        self,
        command: list[str],
        environment: Mapping[str, str],
        directory: RunDirectory,
        sinks: Mapping[Path, Callable[[bytes], None]],
    ) -> None:
        """Start it; see `run_workload`."""
        self._directory, self._sinks = directory, sinks
        self._offsets = dict.fromkeys(sinks, 0)
        self._process = _start(command, environment, directory)

    def follow(self) -> bool:
        """Pass on what it has written; return whether it runs."""
        running = self._process.poll() is None
        _follow(self._sinks, self._offsets)
        return running

    def terminate(self) -> None:
        """Send SIGTERM to its process group."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)

    def wait(self, seconds: float) -> None:
        """Wait until it has ended, for at most this many seconds."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def release(self) -> None:
        """Let the supervisor kill all processes that the workload has left: it does when its standard input ends."""
        if self._process.stdin:
            self._process.stdin.close()

    def end(self) -> Ended:
        """Kill whatever is left, and return how the workload ended."""
        self.release()
        self.wait(KILL_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        _follow(self._sinks, self._offsets)
        if self._directory.end.exists():
            code, seconds = self._directory.end.read_text().split()
            known = self._directory.cause if int(code) else None
            cause = known.read_text(errors="replace").strip() if known and known.exists() else ""
            return Ended(int(code), float(seconds), cause)
        return Ended(self._process.returncode, 0.0)


def run_workload(
    command: list[str],
    environment: Mapping[str, str],
    directory: RunDirectory,
    sinks: Mapping[Path, Callable[[bytes], None]],
    stop: threading.Event,
) -> Ended:
    """Run a command to its end in its run directory, and follow the files that it writes.

    Args:
        command: program and arguments.
        environment: all of the variables that it gets.
        directory: for its stdout, stderr and messages.
        sinks: for each file to follow, the function that gets its new bytes.
        stop: when set, the process group gets SIGTERM and after GRACE_SECONDS SIGKILL.
    """
    process = LocalProcess(command, environment, directory, sinks)
    try:
        while process.follow() and not stop.is_set():
            stop.wait(POLL_SECONDS)
        if stop.is_set():
            process.terminate()
            process.wait(GRACE_SECONDS)
    finally:
        ended = process.end()
    return ended


def _start(command: list[str], environment: Mapping[str, str], directory: RunDirectory) -> "subprocess.Popen[bytes]":
    with directory.stdout.open("wb") as stdout, directory.stderr.open("wb") as stderr:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(supervisor.__file__), str(directory.end), *command],
            env=dict(environment),
            cwd=directory.path,
            stdin=subprocess.PIPE,  # never written to: the supervisor reads its end when this process ends
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )


def _follow(sinks: Mapping[Path, Callable[[bytes], None]], offsets: dict[Path, int]) -> None:
    """Pass on what was appended to files beyond the offsets."""
    for path, sink in sinks.items():
        if path.exists():
            with path.open("rb") as file:
                file.seek(offsets[path])
                while data := file.read(CHUNK):
                    offsets[path] += len(data)
                    sink(data)
