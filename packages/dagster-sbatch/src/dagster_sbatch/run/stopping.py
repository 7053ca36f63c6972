"""The end of a step that is interrupted: whether its Slurm job is cancelled, and what the terminal shows."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

import dagster as dg

LIFE_SECONDS = 10.0
"""Between two questions whether Dagster still counts this run as running."""
_TERMINATED = (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED)


@contextmanager
def watching(context: dg.OpExecutionContext, stop: threading.Event) -> Iterator[None]:
    """Set `stop` when Dagster counts the run as terminated or ended, though the step is alive.

    Signals reach the main thread alone: calls in other threads of the step learn of a termination from this.
    """
    done = threading.Event()

    def watch() -> None:
        while not done.wait(LIFE_SECONDS):
            run = context.instance.get_run_by_id(context.run_id)
            if run is None or run.is_finished or run.status in _TERMINATED:
                stop.set()
                return

    watcher = threading.Thread(target=watch, name="run watcher", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


Interruption = Literal["terminated", "command", "stopped"]


def read_interruption(context: dg.OpExecutionContext) -> Interruption:
    """Return why a step is interrupted.

    Returns:
        `terminated`: a person has terminated or deleted the run; its job is to be cancelled.
        `command`: the run was started by a command in a terminal, and that was interrupted. No daemon retries such a
        run: its job is to be cancelled.
        `stopped`: Dagster is stopping, or counts the run as ended. A later attempt adopts the job.
    """
    run = context.instance.get_run_by_id(context.run_id)
    if run is None or run.status in _TERMINATED:
        return "terminated"
    return "command" if not run.is_finished and run.remote_job_origin is None else "stopped"


def show_on_terminal(text: str) -> None:
    """Write a line to the terminal of this process, if it has one.

    Dagster shows a step's output through processes that Ctrl-C ends together with the step.
    """
    with suppress(OSError):
        terminal = os.open("/dev/tty", os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
        try:
            os.write(terminal, f"\r{text}\r\n".encode())
        finally:
            os.close(terminal)
