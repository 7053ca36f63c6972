"""Jobs that the tests of the run launcher execute: what a run sees, and runs that wait."""

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import dagster as dg

while "REPORTS" in os.environ and Path(os.environ["REPORTS"], "hold").exists():  # a run that is long in starting
    time.sleep(0.05)


@dg.op
def report() -> None:
    seen = {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "variables": dict(os.environ),
        "path": sys.path,
        "folder": str(Path.cwd()),
        "group": os.getpgrp(),
        "threads": threading.active_count(),
        "random": random.random(),
        "descriptors": [str(each.readlink()) for each in Path("/proc/self/fd").iterdir() if each.exists()],
        "command": Path("/proc/self/cmdline").read_text(),
        "python": sys.executable,
    }
    Path(os.environ["REPORTS"], f"{os.getpid()}.part").write_text(json.dumps(seen))
    Path(os.environ["REPORTS"], f"{os.getpid()}.part").rename(Path(os.environ["REPORTS"], f"{os.getpid()}.json"))


@dg.op(ins={"after": dg.In(dg.Nothing)})
def wait() -> None:
    while not Path(os.environ["REPORTS"], "go").exists():
        time.sleep(0.05)


@dg.job(executor_def=dg.in_process_executor)
def reporting() -> None:
    report()


@dg.job(executor_def=dg.in_process_executor)
def waiting() -> None:
    wait(report())


@dg.op
def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@dg.job(executor_def=dg.in_process_executor)
def dying() -> None:
    die()
