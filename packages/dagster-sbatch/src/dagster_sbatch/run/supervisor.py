"""Run a workload on this machine so that none of its processes outlives the Dagster step.

usage: supervisor.py STDOUT COMMAND...   (started by `dagster_sbatch.run.local` as the leader of a process group)

Standard input is a pipe from the step, which never writes to it. It ends when the step ends, also by SIGKILL; then the
supervisor kills the whole group. The workload writes its output into the file STDOUT in its run directory. When it has
ended, the supervisor writes its exit code (negative: the signal that ended it) and its run time in seconds on standard
output, and kills all processes that it left. On Linux these include children in sessions of their own
(`start_new_session=True`, daemons), as at the end of a Slurm job.
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

SWEEP_SECONDS = 5.0  # for killing what is left: a process may hang in a system call
_PR_SET_CHILD_SUBREAPER = 36  # prctl(2): orphans below this process become its children, not init's

_parent_gone = threading.Event()


def _end_with_parent(run_directory: Path) -> None:
    os.read(0, 1)
    _parent_gone.set()
    _kill_children()
    shutil.rmtree(run_directory, ignore_errors=True)  # the step cannot remove it any more
    os.killpg(0, signal.SIGKILL)


def _kill_children() -> None:
    """Kill every process below this one."""
    until = time.monotonic() + SWEEP_SECONDS
    while (left := _children()) and time.monotonic() < until:
        for child in left:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)  # until their children are ours


def _children() -> list[int]:
    """Return the living children of this process; empty where there is no /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = path.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def main() -> None:
    """Run the workload."""
    output, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for number in (signal.SIGTERM, signal.SIGINT):  # they are for the workload, which ends first
        signal.signal(number, lambda *_: None)  # the workload would inherit SIG_IGN
    begun = time.monotonic()
    with Path(output).open("ab") as stdout:
        workload = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout)
    watcher = threading.Thread(target=_end_with_parent, args=(Path(output).parent,), daemon=True)
    watcher.start()
    code = workload.wait()
    if _parent_gone.is_set():
        watcher.join()  # it ends this process
    with suppress(BrokenPipeError):  # the step has just ended
        os.write(1, f"{code} {time.monotonic() - begun}".encode())
    _kill_children()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
