"""Commands and locks on the host."""

import fcntl
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .errors import SiteError


def run_on_host(*command: str) -> str:
    """Run a command on the host and return its output; raise SiteError with its words if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SiteError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def ip(*arguments: str) -> str:
    """Run ip(8) on the host and return its output; raises SiteError."""
    return run_on_host("ip", *arguments)


def spawn(command: Sequence[str], log: Path) -> None:
    """Start a process that outlives this one and belongs to no terminal; what it prints is appended to `log`."""
    with log.open("ab") as output:
        subprocess.run(
            ["setsid", "--fork", *command], stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=True
        )


@contextmanager
def locked(file: Path, wait: bool = True) -> Iterator[bool]:
    """Hold an exclusive lock on `file`, which is made if need be; the kernel releases it when this process ends.

    Args:
        wait: wait until no other process holds it. Otherwise try once.

    Yields:
        Whether this process holds the lock.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
