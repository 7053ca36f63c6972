"""The own code of an environment: a folder of workloads as git has it."""

import base64
import hashlib
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from resources.errors import ConfigurationError

MOST_BYTES = 8 << 20


@dataclass(frozen=True)
class Code:
    """A folder of workloads: programs, and the modules and packages beside them.

    Attributes:
        folder: where it lies here.
        files: content by path below the folder.
        left_out: files beside them that git neither tracks nor ignores, and that do not go along.
    """

    folder: Path
    files: Mapping[str, bytes]
    left_out: tuple[str, ...] = ()

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each file's content."""
        return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(self.files.items())}

    @property
    def encoded(self) -> dict[str, str]:
        """The files in base64, for JSON."""
        return {name: base64.b64encode(content).decode() for name, content in self.files.items()}


def read_code(folder: Path) -> Code:
    """Take what git tracks below a folder, as it is now; without a repository, all but hidden files and caches.

    A dotenv file is never taken.

    Raises:
        ConfigurationError: it is too much, or git does not answer.
    """
    listed = _list(folder)
    names, left_out = (sorted(_walk(folder)), []) if listed is None else listed
    files: dict[str, bytes] = {}
    for name in names:
        path = folder / name
        if path.is_file() and not _is_dotenv(path.name):  # one that git tracks may have been deleted
            files[name] = path.read_bytes()
            if sum(map(len, files.values())) > MOST_BYTES:
                raise ConfigurationError(
                    f"{folder} goes to the supercomputer as code, and has more than {MOST_BYTES >> 20} MB (at {name}): "
                    "keep data elsewhere, for instance below DATA_ROOT"
                )
    return Code(folder, files, tuple(left_out))


def revision_of(folder: Path) -> str:
    """What git calls the state of a folder's repository, with `-dirty` if it is changed; empty without a commit."""
    described = _git(folder, "describe", "--always", "--dirty", "--tags")
    return described.stdout.strip() if described and described.returncode == 0 else ""


def _walk(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in parts):
            yield "/".join(parts)


def _is_dotenv(name: str) -> bool:
    return name == ".env" or name.startswith(".env.") or name.endswith(".env")


def _list(folder: Path) -> tuple[list[str], list[str]] | None:
    """Paths below the folder: what git tracks, and what it neither tracks nor ignores; None without a repository."""
    listed = _git(folder, "ls-files", "-z", "-t", "--cached", "--others", "--exclude-standard")
    if listed is None or "not a git repository" in listed.stderr:
        return None
    if listed.returncode:
        raise ConfigurationError(f"git ls-files in {folder}: {listed.stderr.strip()}")
    rows = [row.split(" ", 1) for row in listed.stdout.split("\0") if row]
    tracked = {name for tag, name in rows if tag != "?"}  # one in conflict is listed for each side
    return sorted(tracked), [name for tag, name in rows if tag == "?"]


def _git(folder: Path, *command: str) -> subprocess.CompletedProcess[str] | None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # of a hook
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *command],
            env={**environment, "LC_ALL": "C"},
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
