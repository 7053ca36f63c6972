"""Make the private folder of a job's Ray on this node, and keep its logs."""

import io
import os
import shutil
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path

from job_cluster import NodeError

_PREFIX = "r-"
_MARK = "job"  # file that names job and node, so that a requeued job finds the folders of its earlier run
FILE_BYTES, ALL_BYTES = 10 << 20, 100 << 20
"""Limits of one log, and of all logs of a node: the time for packing and the user's quota are short."""


def make_folder(base: Path, job: str, node: str) -> Path:
    """Make a folder that only this user can read, under a name that nobody can take beforehand.

    Folders that an earlier run of the same job has left on this node are removed.

    `base`: a folder that other users may write to as well, such as /tmp; other nodes may have the same one.
    Raises NodeError: the base folder is not writable.
    """
    mark = f"{job} {node}"
    try:
        for folder in base.glob(f"{_PREFIX}*"):
            if _has(mark, folder):
                shutil.rmtree(folder)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        (folder / _MARK).write_text(mark)
    except OSError as error:
        raise NodeError(f"cannot make a folder in {base} ({error.strerror}): set RayLauncher's temp_dir") from None
    return folder


def _has(mark: str, folder: Path) -> bool:
    with suppress(OSError):
        return folder.lstat().st_uid == os.getuid() and (folder / _MARK).read_text() == mark
    return False


def keep_logs(logs: Path, archive: Path) -> None:
    """Pack a folder of logs, the smallest first, so that the logs of Ray's own processes are always included.

    Of a longer log, the last FILE_BYTES are kept; logs beyond ALL_BYTES are left out. A file `LEFT_OUT` in the archive
    names both.

    `archive`: a path that ends in .tar.gz; its stem is the folder in the archive.
    """
    name = archive.name.removesuffix(".tar.gz")
    part = archive.with_name(archive.name + ".part")
    files = sorted((path for path in logs.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    left_out, room = [], ALL_BYTES
    with tarfile.open(part, "w:gz", compresslevel=1) as tar:
        for path in files:
            size = path.stat().st_size
            kept = min(size, FILE_BYTES)
            if kept > room:
                left_out.append(f"{path.relative_to(logs)}: {size} bytes, left out")
                continue
            room -= kept
            if kept < size:
                left_out.append(f"{path.relative_to(logs)}: {size} bytes, the last {kept} are kept")
            _add(tar, path, f"{name}/{path.relative_to(logs)}", kept)
        if left_out:
            text = "\n".join([*left_out, ""]).encode()
            entry = tarfile.TarInfo(f"{name}/LEFT_OUT")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text))
    part.rename(archive)


def _add(tar: tarfile.TarFile, path: Path, name: str, kept: int) -> None:
    """Add the last bytes of a file that may still grow."""
    with path.open("rb") as file:
        entry = tar.gettarinfo(arcname=name, fileobj=file)
        file.seek(max(entry.size - kept, 0))
        entry.size = kept
        tar.addfile(entry, file)
