"""Record which part of the refresh fails, and since when: for people to see, and for pauses between the attempts."""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from resources.auth import clock
from resources.auth.errors import AccessError, UnsafeFileError
from resources.auth.files import replace_file

Part = Literal["rotation", "certificate"]

FIRST_PAUSE = timedelta(minutes=1)
LONGEST_PAUSE = timedelta(minutes=30)


@dataclass(frozen=True)
class Failing:
    """A part of the refresh that has not succeeded since its last success.

    Attributes:
        since: the first failure.
        last: the latest one.
        count: how many.
        error: text of the latest one; no secret.
        temporary: whether the latest one may pass by itself.
    """

    since: datetime
    last: datetime
    count: int
    error: str
    temporary: bool = False

    @property
    def pause_ends(self) -> datetime:
        """Return until when it is not tried again by itself."""
        return self.last + pause_after(self.count)


def pause_after(failures: int) -> timedelta:
    """Return how long to wait after so many failures in a row (1 or more): 1, 2, 4 ... minutes, 30 at most."""
    pause: timedelta = FIRST_PAUSE * 2 ** min(failures - 1, 10)
    return min(LONGEST_PAUSE, pause)


class Attempts:
    """The file `<credentials file>.failing`; it is there only while something fails. Writers hold the lock.

    A file that cannot be read or written changes nothing about access itself: it decides only about pauses.
    """

    def __init__(self, credentials_file: Path) -> None:
        self._path = credentials_file.with_name(credentials_file.name + ".failing")

    def failing(self, part: Part) -> Failing | None:
        """Return how a part fails; None if it does not."""
        return self._read().get(part)

    def failed(self, part: Part, error: AccessError) -> None:
        """Record a failure."""
        before = self._read()
        earlier, now = before.get(part), clock.now()
        since, count = (earlier.since, earlier.count + 1) if earlier else (now, 1)
        self._write({**before, part: Failing(since, now, count, str(error), error.temporary)})

    def succeeded(self, part: Part) -> None:
        """Record a success."""
        before = self._read()
        if part in before:
            self._write({name: failing for name, failing in before.items() if name != part})

    def _read(self) -> dict[str, Failing]:
        try:
            raw = json.loads(self._path.read_text(encoding="utf-8"))
            return {
                part: Failing(
                    datetime.fromisoformat(entry["since"]),
                    datetime.fromisoformat(entry["last"]),
                    int(entry["count"]),
                    str(entry["error"]),
                    entry.get("temporary") is True,
                )
                for part, entry in raw.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _write(self, parts: dict[str, Failing]) -> None:
        entries = {part: asdict(failing) for part, failing in parts.items()}
        with suppress(UnsafeFileError, OSError):
            if parts:
                replace_file(self._path, json.dumps(entries, default=datetime.isoformat, indent=1) + "\n")
            else:
                self._path.unlink(missing_ok=True)
