"""Record which part of the refresh fails, and since when: for people, and for the pauses between retries."""

from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from dagster_sbatch import clock
from dagster_sbatch.atomic_write import replace_file
from dagster_sbatch.auth.access_errors import AccessError, RejectedError, UnavailableError

Part = Literal["certificate", "rotation"]

FIRST_PAUSE = timedelta(minutes=1)
LONGEST_PAUSE = timedelta(minutes=30)
SHORTER_WITHOUT_CERTIFICATE = 30
"""The pauses are divided by this while there is no certificate: a minute at most, for all processes together."""


@dataclass(frozen=True)
class Failing:
    """A part of the refresh that has failed since its last success."""

    since: datetime  # the first failure
    last: datetime  # the latest one
    count: int  # how many
    error: str  # text of the latest one; no secret
    temporary: bool = False  # whether the latest one may pass by itself

    @property
    def pause_ends(self) -> datetime:
        """Return until when it is not retried without being asked for."""
        return pause_end(self.last, self.count)

    def again(self) -> AccessError:
        """Return the last error once more, for a caller that must not retry now."""
        kind = UnavailableError if self.temporary else RejectedError
        return kind(
            f"{self.error}\nThat was at {clock.written(self.last)}. To retry now:\n  scripts/refresh_step_auth.py"
        )

    def counts_for(self, call: datetime, now: datetime) -> bool:
        """Return whether a call without a certificate fails at once, because another process has just tried."""
        return call - _pause_after(self.count) / SHORTER_WITHOUT_CERTIFICATE <= self.last <= now


def pause_end(last: datetime, failures: int) -> datetime:
    """Return when the pause after a failure ends.

    There is no pause after a failure in the future: this machine's clock was ahead then.
    """
    return last + _pause_after(failures) if last <= clock.now() else datetime.fromtimestamp(0, UTC)


def _pause_after(failures: int) -> timedelta:
    """Return the pause after this many failures in a row (1 or more): 1, 2, 4 ... minutes, 30 at most."""
    pause: timedelta = FIRST_PAUSE * 2 ** min(failures - 1, 10)
    return min(LONGEST_PAUSE, pause)


class RefreshFailures:
    """The file `<credentials file>.failing`, which exists only while something fails. Writers hold the lock.

    A file that cannot be read or written changes nothing about access itself: it only decides about pauses.
    """

    _format = TypeAdapter(dict[Part, Failing])

    def __init__(self, credentials_file: Path) -> None:
        self._path = credentials_file.with_name(credentials_file.name + ".failing")

    def read(self) -> dict[Part, Failing]:
        """Return the parts that fail."""
        try:
            return self._format.validate_json(self._path.read_bytes())
        except (OSError, ValueError):
            return {}

    def add(self, part: Part, error: AccessError) -> None:
        """Record a failure."""
        failing, now = self.read(), clock.now()
        before = failing.get(part)
        since, count = (before.since, before.count + 1) if before else (now, 1)
        self._write({**failing, part: Failing(since, now, count, str(error), error.temporary)})

    def clear(self, part: Part) -> None:
        """Record a success."""
        failing = self.read()
        if failing.pop(part, None):
            self._write(failing)

    def _write(self, failing: dict[Part, Failing]) -> None:
        with suppress(OSError):
            if failing:
                replace_file(self._path, self._format.dump_json(failing, indent=1).decode() + "\n")
            else:
                self._path.unlink(missing_ok=True)
