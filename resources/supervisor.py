"""Run a workload on this machine so that nothing of it outlives the Dagster step.

usage: supervisor.py EXIT_CODE_FILE COMMAND...   (started by `resources.local` as the leader of a process group)

Standard input is a pipe that the step holds and never writes to: it ends when the step does, also when that was killed
with SIGKILL, and then the whole group is killed. When the workload ends, its exit code is written down (negative: the
signal that ended it) and whatever it left behind in the group is killed.
"""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path


def _end_with_parent() -> None:
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Run it."""
    exit_code_file, *command = sys.argv[1:]
    for number in (signal.SIGTERM, signal.SIGINT):  # meant for the workload, whose end is waited for here.
        signal.signal(number, lambda *_: None)  # A handler, since SIG_IGN would be inherited by the workload
    workload = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    code = workload.wait()
    part = Path(exit_code_file + ".part")
    part.write_text(str(code))
    part.rename(exit_code_file)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
