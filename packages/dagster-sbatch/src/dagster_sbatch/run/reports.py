"""What a step reports to people: lines of its log and of the terminal, and checks of `musica_access`."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import dagster as dg

ACCESS = dg.AssetKey("musica_access")
REACHABLE, LEFT_JOBS = "jobs_are_reachable", "jobs_are_followed"  # its checks about jobs on the supercomputer


class StepLog:
    """Writes into the step's log with `info`, `warning` and `error`.

    Dagster raises if its database does not store a line: the disk is full, or the database is down. The job is still
    running then, so the line is lost and the step continues. They return whether it is stored.
    """

    def __init__(self, context: dg.OpExecutionContext) -> None:
        self.info = partial(_write, context.log.info)
        self.warning = partial(_write, context.log.warning)
        self.error = partial(_write, context.log.error)


def _write(write: Callable[[str], None], text: str) -> bool:
    try:
        write(text)
    except Exception as error:  # noqa: BLE001 - each database has errors of its own
        with suppress(OSError):
            print(f"{text}\n(Dagster could not store this line: {error})", file=sys.stderr, flush=True)
        return False
    return True


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


def report_reachable(context: dg.OpExecutionContext, *, passed: bool, description: str) -> None:
    """Report whether the step that follows a job can reach the login node; the run's log has the same text."""
    evaluation = evaluate(REACHABLE, passed=passed, description=f"Run {context.run_id}: {description}")
    with suppress(Exception):  # a step that waits for its job does not fail because of a report
        context.instance.report_runless_asset_event(evaluation)


def markdown(text: str) -> str:
    """Return a text for Dagster's UI, which joins lines that do not end with two spaces."""
    return text.replace("\n", "  \n")


def evaluate(check: str, *, passed: bool, description: str) -> dg.AssetCheckEvaluation:
    """Return an evaluation of one of the checks."""
    return dg.AssetCheckEvaluation(
        asset_key=ACCESS,
        check_name=check,
        passed=passed,
        description=markdown(description),
        severity=dg.AssetCheckSeverity.ERROR,
        metadata={},
    )
