"""Run the workload as one rank: label its output, and record its failure.

usage: one_rank.py [--mpi] FAILURE COMMAND...   (in the run directory)

COMMAND contains Python's arguments. A rank that fails writes the file FAILURE, unless another one was earlier: others
fail as a result. With --mpi, a rank that raises ends all others, if mpi4py is installed (mpi_rank.py).
"""

import base64
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import zlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

_MPI_RANK = Path(__file__).with_name("mpi_rank.py")
STDOUT, STDERR = 1, 2
WORK = "work"  # folder of the run directory in which the workload runs
KEPT_LINES, TAIL_LINES = 200, 20
"""Last lines of a rank's stderr: how many are searched for the cause, and how many are shown with it."""
LONGEST_LINE = 1 << 16  # bytes of a line that are labelled at once
DRAIN_SECONDS = 2.0  # wait for more output of a rank that has ended: a process that it has left may keep the pipe open
POLL_SECONDS = 0.05
RANK_VARIABLES = ("SLURM_PROCID", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "RANK")
"""Variables in which srun, two kinds of mpiexec and `ranks.py local` pass the rank."""


def main() -> int:
    """Return the exit code of the rank."""
    words = sys.argv[1:]
    mpi = words[0] == "--mpi"
    failure, *command = words[mpi:]
    if mpi and importlib.util.find_spec("mpi4py"):  # else a rank that raises waits for the others for ever
        command = [str(_MPI_RANK), failure, *command]
    return run_rank(Path(failure), command)


def run_rank(failure: Path, command: Sequence[str]) -> int:
    """Run the workload as the rank that the environment names; return its exit code, by the rules of a shell."""
    rank = next(os.environ[name] for name in RANK_VARIABLES if name in os.environ)
    world = os.environ.get("SLURM_NTASKS") or os.environ["WORLD_SIZE"]
    os.environ.update(RANK=rank, WORLD_SIZE=world, LOCAL_RANK=os.environ.get("SLURM_LOCALID", rank))
    leave_signals_to_the_workload()
    first = rank == "0"
    if not first:
        os.environ["DAGSTER_PIPES_MESSAGES"] = encode_param({"path": os.devnull, "include_stdio_in_messages": False})
    workload = subprocess.Popen(
        [sys.executable, *command],
        cwd=WORK,
        stdin=subprocess.DEVNULL,
        stdout=None if first else subprocess.PIPE,
        stderr=subprocess.PIPE,
        close_fds=False,  # MPI may have one of srun's
    )
    if are_known_by_cgroup(Path("/proc/self/cgroup"), os.environ.get("SLURM_JOB_ID", "")):
        signal.signal(signal.SIGTERM, lambda *_: workload.send_signal(signal.SIGTERM))
    if first:
        with suppress(OSError):  # the disk is full: the workload gets no warning
            Path("workload.pid").write_text(f"{workload.pid}\n")  # gets the warning before the time limit
    label = "" if first else f"[rank {rank}] "
    outputs = [Output(workload.stderr, STDERR, label)]
    outputs += [] if first else [Output(workload.stdout, STDOUT, label)]
    code = workload.wait()
    for output in outputs:
        output.drain()
    if code:
        record_failure(failure, code, outputs[0].lines)
    return shell_code(code)


def record_failure(path: Path, code: int, stderr: Iterable[str]) -> None:
    """Record how this rank has failed, with its last lines of stderr, unless another rank has recorded a failure.

    The file is there with all of it, or not at all.
    """
    host = socket.gethostname()
    record = {"rank": os.environ["RANK"], "host": host, "code": code, "stderr": list(stderr)[-TAIL_LINES:]}
    part = path.with_name(f"{path.name}-{host}-{os.getpid()}")
    try:
        part.write_text(json.dumps(record))
        with suppress(FileExistsError):
            os.link(part, path)
        part.unlink()
    except OSError as error:
        print(f"The failure of this rank cannot be recorded: {error}", file=sys.stderr)


def encode_param(param: Mapping[str, object]) -> str:
    """Return a parameter as `dagster_pipes.encode_param` does, which the environment of an MPI program may lack."""
    return base64.b64encode(zlib.compress(json.dumps(param).encode())).decode()


def leave_signals_to_the_workload() -> None:
    """Let this process survive the signals for its group; it does not ignore them: the workload would inherit that."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)


def are_known_by_cgroup(cgroups: Path, job: str) -> bool:
    """Return whether Slurm knows the processes of a job by their cgroup: of a task, this process alone gets SIGTERM.

    `cgroups`: /proc/self/cgroup. Of version 1, the freezer counts.
    """
    with suppress(OSError):
        return re.search(rf":(freezer)?:[^:]*/job_{job}/", cgroups.read_text()) is not None
    return False


def shell_code(code: int) -> int:
    """Return an exit code by the rules of a shell; `code`: negative is the signal, as in `subprocess`."""
    return 128 - code if code < 0 else code


class Output:
    """Copies what a process writes, line by line, and remembers the last lines."""

    def __init__(self, source: IO[bytes] | None, target: int, label: str = "") -> None:
        """Start to copy, in a thread.

        `target`: a file descriptor. The thread may be blocked in writing when this process ends: a buffer of Python
        would be locked then, and Python would abort.
        """
        assert source is not None
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._source, self._target, self._label = source, target, label.encode()
        self._writing = False
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        with self._source:
            for line in iter(lambda: self._source.readline(LONGEST_LINE), b""):
                self._writing = True
                self._write(self._label + (line if line.endswith(b"\n") or not self._label else line + b"\n"))
                self.lines.append(line.decode(errors="replace").rstrip())
                self._writing = False

    def _write(self, data: bytes) -> None:
        with suppress(OSError):  # the disk is full: the workload continues
            while data:
                data = data[os.write(self._target, data) :]

    def drain(self) -> None:
        """Copy the rest: wait as long as it takes to write it, and DRAIN_SECONDS for the source."""
        waited = 0.0
        while self._thread.is_alive() and waited < DRAIN_SECONDS:
            self._thread.join(POLL_SECONDS)
            waited += 0 if self._writing else POLL_SECONDS


if __name__ == "__main__":
    exit_code = main()
    with suppress(OSError):
        sys.stderr.flush()
    os._exit(exit_code)  # a thread may still read or write
