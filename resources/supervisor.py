"""Run a workload on this machine so that its process group does not outlive the Dagster step.

usage: supervisor.py EXIT_CODE_FILE COMMAND...   (started by `resources.local` as the leader of a process group)

Standard input is a pipe that the step holds and never writes to: it ends when the step does, also when that was killed
with SIGKILL, and then the whole group is killed. When the workload ends, its exit code is written down (negative: the
signal that ended it) and whatever it left behind in the group is killed. A child that a workload puts into a session of
its own (`start_new_session=True`) is out of reach; Ray's do so too, and end with their driver.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path


def _end_with_parent(run_directory: Path) -> None:
    os.read(0, 1)
    # The step would have removed it.
    shutil.rmtree(run_directory, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Run it."""
    exit_code_file, *command = sys.argv[1:]
    for number in (signal.SIGTERM, signal.SIGINT):  # meant for the workload, whose end is waited for here.
        signal.signal(number, lambda *_: None)  # A handler, since SIG_IGN would be inherited by the workload
    workload = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_with_parent, args=(Path(exit_code_file).parent,), daemon=True).start()
    code = workload.wait()
    part = Path(exit_code_file + ".part")
    part.write_text(str(code))
    part.rename(exit_code_file)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
