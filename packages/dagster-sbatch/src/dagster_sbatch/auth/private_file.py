"""Read files with secrets: nothing that others can read, or could have written."""

import os
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dagster_sbatch.auth.access_errors import UnsafeFileError


@contextmanager
def explained() -> Iterator[None]:
    """Turn an OSError into an AccessError: whoever connects would take it for a lost connection, and retry."""
    try:
        yield
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        raise UnsafeFileError(
            f"A file that access needs cannot be used: {place}{error.strerror or error}. Check its folder, its "
            "permissions and the space on that disk"
        ) from error


def read_private(path: Path) -> str | None:
    """Return the text of a file that only its owner can read; None where there is no file.

    Raises UnsafeFileError: it is a symbolic link, not a plain file, of another owner, or readable by group or others.
    The last line of the text is the command that corrects it.
    Raises OSError: it cannot be read.
    """
    name = shlex.quote(str(path))
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError:
        if path.is_symlink():
            raise UnsafeFileError(
                f"{path} is a symbolic link to {path.readlink()}. A link to a file with secrets is not followed. "
                f'Put the file itself there:\n  f=$(readlink -f {name}) && rm {name} && mv "$f" {name}'
            ) from None
        raise
    try:
        _check_private(path, os.fstat(descriptor))
        with os.fdopen(os.dup(descriptor), encoding="utf-8", errors="replace") as file:
            return file.read()
    finally:
        os.close(descriptor)


def _check_private(path: Path, status: os.stat_result) -> None:
    name = shlex.quote(str(path))
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeFileError(f"{path} is not a plain file. Move it away")
    if status.st_uid != os.geteuid():
        raise UnsafeFileError(
            f"{path} belongs to another user (uid {status.st_uid}), who could read and change it. "
            f"Move it away, and a new one is made:\n  mv {name} {shlex.quote(str(path) + '.foreign')}"
        )
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise UnsafeFileError(f"{path} can be read by others (mode {mode:04o}). Close it:\n  chmod 600 {name}")
