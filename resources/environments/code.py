"""The own code of an environment: a code root as git has it."""

import base64
import hashlib
import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from resources.children import child_environment
from resources.errors import ConfigurationError

MOST_BYTES = 8 << 20
MOST_NAMES = 20
"""Files that a note lists."""
_SUBMODULE_MODE = "160000 "


@dataclass(frozen=True)
class Code:
    """A code root: programs, and the modules and packages that they import.

    Attributes:
        folder: where it lies here.
        files: content by path below the folder.
        left_out: files in it that git neither tracks nor ignores, and that are not sent.
        in_git: whether git says what belongs to it.
    """

    folder: Path
    files: Mapping[str, bytes]
    left_out: tuple[str, ...] = ()
    in_git: bool = True

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each file's content."""
        return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(self.files.items())}

    @property
    def encoded(self) -> dict[str, str]:
        """The files in base64, for JSON."""
        return {name: base64.b64encode(content).decode() for name, content in self.files.items()}

    @property
    def notes(self) -> list[str]:
        """What people should know of what is sent."""
        found = [f"git does not track {self.folder / name}: it is not sent" for name in self.left_out]
        if not self.in_git:
            names, more = sorted(self.files)[:MOST_NAMES], len(self.files) - MOST_NAMES
            listed = ", ".join(names) + (f" and {more} more" if more > 0 else "")
            found.append(f"{self.folder} is in no git repository: all {len(self.files)} files in it are sent: {listed}")
        return found


def read_code(folder: Path) -> Code:
    """Read what git tracks below a folder, as it is now; without a repository, all but hidden files and caches.

    Submodules are included. A link is sent as what it points to. A dotenv file is never sent.

    Raises:
        ConfigurationError: it is too much, a link leaves the folder, a submodule is not there, or git does not answer.
    """
    listed = _list(folder)
    names, left_out = (sorted(_walk(folder)), []) if listed is None else listed
    files: dict[str, bytes] = {}
    size = 0
    for name in _follow_links(folder, names):
        path = folder / name
        if path.is_file() and not _is_dotenv(path.name) and not _is_dotenv(path.resolve().name):
            files[name] = path.read_bytes()  # one that git tracks may have been deleted
            size += len(files[name])
            if size > MOST_BYTES:
                raise ConfigurationError(
                    f"{folder} goes to the supercomputer as code, and has more than {MOST_BYTES >> 20} MB (at {name}): "
                    "keep data elsewhere, for instance below DATA_ROOT"
                )
    return Code(folder, files, tuple(left_out), in_git=listed is not None)


def _follow_links(folder: Path, names: Sequence[str]) -> Iterator[str]:
    """The names, and for a link to a folder those of what lies in it, below the name of the link."""
    root = folder.resolve()

    def expand(name: str, above: tuple[Path, ...]) -> Iterator[str]:
        path = folder / name
        target = path.resolve()
        if not target.is_relative_to(root):
            raise ConfigurationError(
                f"{path} is a link to {target}, outside the code root {folder}. Only the code root is sent to the "
                "supercomputer: move there what the workloads need, or remove the link."
            )
        if not (path.is_symlink() and target.is_dir()):
            yield name
            return
        if target in above or path.parent.resolve().is_relative_to(target):
            raise ConfigurationError(f"{path} is a link to {target}, which contains it. Remove the link.")
        inside = "" if target == root else f"{target.relative_to(root).as_posix()}/"
        for each in names:
            if each.startswith(inside):
                yield from expand(f"{name}/{each.removeprefix(inside)}", (*above, target))

    for name in names:
        yield from expand(name, ())


def revision_of(folder: Path) -> str:
    """What git calls the state of a folder's repository, with `-dirty` if it is changed; empty without a commit."""
    described = _git(folder, "describe", "--always", "--dirty", "--tags")
    return described.stdout.strip() if described and described.returncode == 0 else ""


def _walk(folder: Path) -> Iterator[str]:
    for path, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        linked = [name for name in folders if os.path.islink(f"{path}/{name}")]  # noqa: PTH114
        for name in (*files, *linked):
            if not name.startswith("."):
                yield (Path(path) / name).relative_to(folder).as_posix()


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
    left_out = [name for tag, name in rows if tag == "?"]
    for name in _submodules(folder):
        inner = _list(folder / name) if (folder / name / ".git").exists() else None
        if inner is None:
            raise ConfigurationError(
                f"the submodule {folder / name} is not checked out here:\n"
                f"git -C {shlex.quote(str(folder))} submodule update --init --recursive"
            )
        tracked = (tracked - {name}) | {f"{name}/{each}" for each in inner[0]}
        left_out += [f"{name}/{each}" for each in inner[1]]
    return sorted(tracked), left_out


def _submodules(folder: Path) -> list[str]:
    """Paths of the submodules below the folder."""
    staged = _git(folder, "ls-files", "-z", "--stage")
    rows = staged.stdout.split("\0") if staged else []
    return [row.partition("\t")[2] for row in rows if row.startswith(_SUBMODULE_MODE)]


def _git(folder: Path, *command: str) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *command],
            env=child_environment(LC_ALL="C"),  # without GIT_..., which a hook has
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
