"""The user's own code in an environment: a code root, as git tracks it."""

import base64
import hashlib
import os
import shlex
import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dagster_sbatch.children import child_environment
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.slurm.gateway.agent.building import EXECUTABLE
from dagster_sbatch.slurm.units import count_of, list_names

MOST_BYTES = 8 << 20  # size of all files together; more than this is data, not code
MOST_NAMES = 20  # files that a note lists by name
_SUBMODULE_MODE = "160000"


@dataclass(frozen=True)
class Code:
    """The files of a code root."""

    folder: Path  # the code root on this machine
    files: Mapping[str, bytes]  # content by path below the folder
    executable: frozenset[str] = frozenset()  # paths of the files that their owner may execute
    left_out: tuple[str, ...] = ()  # files that git neither tracks nor ignores. They are not sent
    dotenv: tuple[str, ...] = ()  # dotenv files, which are not sent: they may hold secrets
    in_git: bool = True  # False if the folder is in no git repository; then all its files are sent

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each file's content, by path; with EXECUTABLE at its end if the file is executable."""
        return {
            name: hashlib.sha256(content).hexdigest() + (EXECUTABLE if name in self.executable else "")
            for name, content in sorted(self.files.items())
        }

    @property
    def encoded(self) -> dict[str, str]:
        """Content of each file in base64, by path; for JSON."""
        return {name: base64.b64encode(content).decode() for name, content in self.files.items()}

    @property
    def notes(self) -> list[str]:
        """Sentences for the user: files that are not sent, and files that are sent because there is no git."""
        lists = (list_names(sorted(names), MOST_NAMES) for names in (self.left_out, self.dotenv, self.files))
        left_out, dotenv, sent = map(_shown, lists)
        number = count_of(len(self.files), "file")
        notes = {
            f"{self.folder} is in no git repository, so everything in it is sent ({number}): {sent}": not self.in_git,
            f"git does not track these files in {self.folder}, so they are not sent: {left_out}": left_out,
            f"These files in {self.folder} are not sent, because dotenv files may hold secrets: {dotenv}. "
            "Rename one that the workloads read": dotenv,
        }
        return [note for note, applies in notes.items() if applies]


def read_code(folder: Path) -> Code:
    """Read the files that git tracks below a folder, with uncommitted changes.

    Without a git repository, read all files but hidden ones and caches. Submodules are included. A link is replaced by
    what it points to. A dotenv file is never read.
    Raises ConfigurationError: the files are larger than MOST_BYTES, a name is not in UTF-8, a link leads out of the
    folder, a submodule is not checked out, or git fails.
    """
    listed = _list_files(folder)
    names, left_out = (sorted(_walk(folder)), []) if listed is None else listed
    files: dict[str, bytes] = {}
    executable: set[str] = set()
    dotenv: list[str] = []
    size = 0
    for name in _follow_links(folder, names):
        path = folder / name
        if path.is_file() and (is_dotenv(path.name) or is_dotenv(path.resolve().name)):
            dotenv.append(name)
        elif path.is_file():
            about = path.stat()  # git tracks a file that was deleted, too
            size += about.st_size
            if size > MOST_BYTES:
                raise ConfigurationError(
                    f"{folder} has more than {MOST_BYTES >> 20} MB (at {name}). All of it is sent to the supercomputer "
                    "as code. Keep data elsewhere, for instance below DATA_ROOT."
                )
            if name != _shown(name):
                raise ConfigurationError(f"The name of {folder}/{_shown(name)} is not in UTF-8. Rename the file.")
            files[name] = path.read_bytes()
            if about.st_mode & stat.S_IXUSR:
                executable.add(name)
    return Code(folder, files, frozenset(executable), tuple(left_out), tuple(dotenv), in_git=listed is not None)


def revision_of(folder: Path) -> str:
    """Return `git describe` of a folder's repository, with `-dirty` if files are changed; empty without a commit."""
    return ask_git(folder, "describe", "--always", "--dirty", "--tags")


def ask_git(folder: Path, *command: str) -> str:
    """Return what git prints in a folder; nothing if it fails or is not installed."""
    done = run_git(folder, *command)
    return done.stdout.strip() if done and done.returncode == 0 else ""


def _follow_links(folder: Path, names: Sequence[str]) -> Iterator[str]:
    """Yield the names; in place of a link to a folder, yield each file of that folder below the link's name."""
    root = folder.resolve()

    def expand(name: str, above: tuple[Path, ...]) -> Iterator[str]:
        path = folder / name
        target = path.resolve()
        if not target.is_relative_to(root):
            raise ConfigurationError(
                f"{path} is a link to {target}, outside the code root {folder}. Only the code root is sent to the "
                "supercomputer. Move there what the workloads need, or remove the link."
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


def _walk(folder: Path) -> Iterator[str]:
    """Yield the files and links to folders below a folder, without hidden ones and caches."""
    for path, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        linked = [name for name in folders if os.path.islink(f"{path}/{name}")]  # noqa: PTH114
        for name in (*files, *linked):
            if not name.startswith("."):
                yield (Path(path) / name).relative_to(folder).as_posix()


def _shown(name: str) -> str:
    """Return a name in UTF-8, which is the same unless bytes of it could not be decoded."""
    return name.encode(errors="backslashreplace").decode()


def is_dotenv(name: str) -> bool:
    """Return whether a file of this name is a dotenv file."""
    return name == ".env" or name.startswith(".env.") or name.endswith(".env")


def _list_files(folder: Path) -> tuple[list[str], list[str]] | None:
    """Return the paths that git tracks, and those that it neither tracks nor ignores; None without a repository."""
    listed = run_git(folder, "ls-files", "-z", "-t", "--cached", "--stage", "--others", "--exclude-standard")
    if listed is None or "not a git repository" in listed.stderr:
        return None
    if listed.returncode:
        raise ConfigurationError(f"git ls-files in {folder}: {listed.stderr.strip()}")
    tracked: set[str] = set()  # a file in conflict is listed once for each side
    left_out: list[str] = []
    for row in filter(None, listed.stdout.split("\0")):
        tag, _, rest = row.partition(" ")  # `? PATH`, or `H MODE OBJECT STAGE<tab>PATH`
        if tag == "?":
            left_out.append(rest)
            continue
        details, _, name = rest.partition("\t")
        if not details.startswith(_SUBMODULE_MODE):
            tracked.add(name)
            continue
        inner = _list_files(folder / name) if (folder / name / ".git").exists() else None
        if inner is None:
            raise ConfigurationError(
                f"the submodule {folder / name} is not checked out here. Its files cannot be sent. Check it out:\n"
                f"git -C {shlex.quote(str(folder))} submodule update --init --recursive"
            )
        tracked.update(f"{name}/{each}" for each in inner[0])
        left_out += [f"{name}/{each}" for each in inner[1]]
    return sorted(tracked), left_out


def run_git(folder: Path, *command: str) -> subprocess.CompletedProcess[str] | None:
    """Run git in a folder; None if git is not installed.

    It does not get the Ctrl-C of the terminal, which could end it between two of its files.
    """
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *command],
            env=child_environment(LC_ALL="C"),  # without GIT_..., which a hook has
            capture_output=True,
            text=True,
            errors="surrogateescape",  # of names
            check=False,
            start_new_session=True,
        )
    except FileNotFoundError:
        return None
