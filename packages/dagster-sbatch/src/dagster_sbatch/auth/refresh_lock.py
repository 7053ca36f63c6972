"""The lock that lets one process or thread refresh at a time, of all that use the same credentials file."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dagster_sbatch.auth import clock
from dagster_sbatch.auth.access_errors import UnavailableError

POLL_SECONDS = 0.05


@contextmanager
def refresh_lock(credentials_file: Path, seconds: float) -> Iterator[None]:
    """Hold the lock `<credentials file>.lock`; the system releases it when the process ends.

    Raises:
        UnavailableError: another process holds it for longer; the text names it.
        OSError: the lock file cannot be written.
    """
    from filelock import FileLock, Timeout

    path = credentials_file.with_name(credentials_file.name + ".lock")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = FileLock(
            path, timeout=seconds, mode=0o600, poll_interval=POLL_SECONDS, on_acquired=_sign, fallback_to_soft=False
        )
        lock.acquire()
    except Timeout:
        holder = path.read_text().strip() or "it did not write its name"
        raise UnavailableError(
            f"Another process has been refreshing the credentials for more than {seconds:.0f} s: {holder}. "
            "It times out by itself after some minutes; if it does not, end that process"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _sign(descriptor: int) -> None:
    """Write into the lock file who holds it: the program's name without its arguments, which might be secret."""
    program = Path(sys.argv[0]).name or "python"
    text = f"process {os.getpid()} ({program}) on {socket.gethostname()} since {clock.written(clock.now())}\n"
    with suppress(OSError):  # a full disk: the lock holds without a name
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
