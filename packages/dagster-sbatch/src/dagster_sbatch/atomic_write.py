"""Replace files on this machine: after a crash at any moment, the old or the new one is there, whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[BufferedRandom]:
    """Yield a new file, to write and to read; at the end of the block it replaces `path`.

    It has its mode from its first byte. If the block raises, the old file stays. Two callers at once for one path need
    a lock.
    Raises OSError: the folder cannot be written to, or the disk is full; its `filename` is the path. The old file
    stays.
    """
    new = _new(path)
    try:
        new.unlink(missing_ok=True)  # of a process that was killed
        descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        with suppress(OSError):  # not every file system can
            _sync_folder(path.parent)
    except BaseException as error:
        remove_half_written(path)
        if isinstance(error, OSError) and error.filename in (None, new, str(new)):
            error.filename = str(path)
        raise


def replace_file(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace a file by a text. A missing folder is made, with mode 0700; raises as `replacing`."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with replacing(path, mode) as file:
        file.write(text.encode())


def remove_half_written(path: Path) -> None:
    """Remove what a process that was killed in `replacing` has left; for the holder of the lock."""
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
