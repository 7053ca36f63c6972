"""Read and replace files that decide about access: nothing half-written, nothing that others can read."""

import os
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dagster_sbatch.auth.errors import UnsafeFileError


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

    Raises:
        UnsafeFileError: it is a symbolic link, not a plain file, of another owner, readable by group or others, or
            cannot be read at all. The last line of the text is the command that corrects it.
    """
    name = shlex.quote(str(path))
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if path.is_symlink():
            raise UnsafeFileError(
                f"{path} is a symbolic link to {path.readlink()}. A link to a file with secrets is not followed. "
                f'Put the file itself there:\n  f=$(readlink -f {name}) && rm {name} && mv "$f" {name}'
            ) from None
        raise UnsafeFileError(f"{path} cannot be read: {error.strerror}. Check it and its folder") from None
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


def replace_file(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace a file: after a crash at any moment, the old or the new one is there, whole.

    The new file has its mode from its first byte. A missing folder is made (mode 0700). Two callers at once for one
    path need a lock.

    Raises:
        UnsafeFileError: the folder cannot be written to, or the disk is full; the old file stays.
    """
    new = _new(path)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new.unlink(missing_ok=True)  # of a process that was killed
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        remove_half_written(path)
        raise UnsafeFileError(
            f"{path} cannot be written: {error.strerror}. Check its folder, and the space on that disk"
        ) from None


def remove_half_written(path: Path) -> None:
    """Remove what a killed `replace_file` of this path has left; for the holder of the lock."""
    with suppress(OSError):
        _new(path).unlink(missing_ok=True)


def _new(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
