"""Run a workload on this machine so that nothing of it outlives the Dagster step.

usage: supervisor.py END_FILE COMMAND...   (started by `dagster_sbatch.run.local` as the leader of a process group)

Standard input is a pipe that the step holds and never writes to: it ends when the step does, also when that was killed
with SIGKILL, and then the whole group is killed. When the workload ends, its exit code (negative: the signal that ended
it) and how many seconds it ran are written down, and whatever it left behind is killed. On Linux that includes children
in sessions of their own (`start_new_session=True`, daemons), as the end of a Slurm job would.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

SWEEP_SECONDS = 5.0
"""For all that is left to be killed: a process may hang in a system call."""
_PR_SET_CHILD_SUBREAPER = 36
"""prctl(2): orphans below this process become its children, not init's."""

_parent_gone = threading.Event()


def _end_with_parent(run_directory: Path) -> None:
    os.read(0, 1)
    _parent_gone.set()
    # The step would have removed it.
    shutil.rmtree(run_directory, ignore_errors=True)
    _kill_all()


def _kill_all() -> None:
    """Kill every process below this one, then this one with its group."""
    until = time.monotonic() + SWEEP_SECONDS
    while (left := _children()) and time.monotonic() < until:
        for child in left:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)  # until their children are ours
    os.killpg(0, signal.SIGKILL)


def _children() -> list[int]:
    """The living children of this process; empty where there is no /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = path.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def main() -> None:
    """Run it."""
    end_file, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGTERM, signal.SIGINT):  # meant for the workload, whose end is waited for here.
        signal.signal(number, lambda *_: None)  # A handler, since SIG_IGN would be inherited by the workload
    begun = time.monotonic()
    workload = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    watcher = threading.Thread(target=_end_with_parent, args=(Path(end_file).parent,), daemon=True)
    watcher.start()
    code = workload.wait()
    if _parent_gone.is_set():
        watcher.join()  # it ends this process
    part = Path(end_file + ".part")
    with suppress(FileNotFoundError):  # the step has gone just now
        part.write_text(f"{code} {time.monotonic() - begun}")
        part.rename(end_file)
    _kill_all()


if __name__ == "__main__":
    main()
