"""The private folder of a job's Ray on this node: make it, keep its logs, remove it."""

import io
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

from job_cluster import NodeError

_PREFIX = "r-"
_MARK = "job"
"""File in the folder that names its job: what an earlier life of the job has left is found by it."""
FILE_BYTES, ALL_BYTES = 10 << 20, 100 << 20
"""What is kept of one log, and of all logs of a node: both the time for packing and the user's quota are short."""


def make_folder(base: Path, job: str) -> Path:
    """Make a folder for this user alone, under a name that nobody can take beforehand.

    Folders that an earlier life of the job has left are removed.

    Args:
        base: a folder in which others may write, too, such as /tmp.
        job: id of the Slurm job.

    Raises:
        NodeError: nothing can be written there.
    """
    try:
        for folder in _folders_of(base, job):
            shutil.rmtree(folder)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        (folder / _MARK).write_text(job)
    except OSError as error:
        raise NodeError(
            f"cannot make a folder in {base} ({error.strerror}): RayLauncher's temp_dir says where"
        ) from None
    return folder


def _folders_of(base: Path, job: str) -> list[Path]:
    return [folder for folder in base.glob(f"{_PREFIX}*") if _is_ours(folder) and _job_of(folder) == job]


def _is_ours(folder: Path) -> bool:
    there = folder.lstat()
    return there.st_uid == os.getuid()


def _job_of(folder: Path) -> str | None:
    try:
        return (folder / _MARK).read_text()
    except OSError:
        return None


def keep_logs(logs: Path, archive: Path) -> None:
    """Pack a folder of logs, the small ones first, so that what Ray's own processes say is there in any case.

    A log over FILE_BYTES is kept from there to its end; after ALL_BYTES the rest is left out. A file `LEFT_OUT` in the
    archive names both.

    Args:
        logs: the folder.
        archive: a path that ends in .tar.gz; its stem is the folder in the archive.
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
