"""The log of a step, as its run's events show it."""

import sys
from collections.abc import Callable
from contextlib import suppress

from dagster_sbatch.run.results import StepContext


class StepLog:
    """Writes into the step's log; a line that Dagster cannot store is lost and does not end the step.

    Dagster raises if its database does not take a line: the disk is full, or the database is away for a moment. The job
    runs on meanwhile, and must not be lost for a line of the log.
    """

    def __init__(self, context: StepContext) -> None:
        self._log = context.log

    def info(self, text: str) -> None:
        """Log at level INFO."""
        _write(self._log.info, text)

    def warning(self, text: str) -> None:
        """Log at level WARNING."""
        _write(self._log.warning, text)

    def error(self, text: str) -> None:
        """Log at level ERROR."""
        _write(self._log.error, text)


def _write(write: Callable[[str], None], text: str) -> None:
    try:
        write(text)
    except Exception as error:  # noqa: BLE001 - of whatever database it is
        with suppress(OSError):
            print(f"{text}\n(Dagster could not store this line: {error})", file=sys.stderr, flush=True)
