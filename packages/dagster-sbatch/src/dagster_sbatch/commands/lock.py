"""Resolve the dependencies in pyproject.toml to exact versions with hashes: requirements/*.txt.

The lock files of a copy of the template are made from those of the template, without a network: uv writes into a lock
file which packages require each one. The result is what `scripts/lock` writes in the copy.
"""

import difflib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from dagster_sbatch.atomic_write import replace_file
from dagster_sbatch.children import NETWORK, child_environment
from dagster_sbatch.commands.command_line import entry_point, make_parser
from dagster_sbatch.commands.vendored import PACKAGES
from dagster_sbatch.environments.groups import GROUP, PREFIX, find_groups
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.project import Project
from dagster_sbatch.text_file import read_text

DESCRIPTION = """\
Resolve the dependencies in pyproject.toml to exact versions with hashes: requirements/*.txt.

dev.txt is the project with its `dev` extra, for this machine; cluster.txt is the `cluster` group, for the
supercomputer; cluster-NAME.txt is the group `cluster-NAME`, for assets with environment="NAME". Without an option, only
versions that pyproject.toml no longer allows are changed.
"""
EPILOG = "exit codes: 0 done, or up to date; 1 --check found a difference (it is printed), or uv failed; 2 wrong usage"
OPTIONS = """
    --universal --python-version 3.11 --generate-hashes --no-strip-extras --no-header --quiet
    --custom-compile-command scripts/lock
    """.split()
DIRECT = "(pyproject.toml"  # uv writes this behind a project's name where the project itself requires a package


@entry_point()
def main(project: Project) -> int:
    parser = make_parser(DESCRIPTION, EPILOG)
    parser.add_argument("--upgrade", action="store_true", help="use the newest versions that pyproject.toml allows")
    parser.add_argument("--check", action="store_true", help="change nothing; print what is not up to date")
    options = parser.parse_args()
    if options.check:
        return check(project.root)
    for path, text in resolve(project.root, upgrade=options.upgrade).items():
        replace_file(path, text, mode=0o666)
    return 0


def check(root: Path) -> int:
    """Print the lines of the lock files that `scripts/lock` would change."""
    changes = [line for path, text in resolve(root).items() for line in _compare(path, text)]
    if changes:
        print("\n".join([*changes, "requirements/ is not what pyproject.toml asks for. Update it:\nscripts/lock"]))
    return int(bool(changes))


def locked_files(root: Path) -> dict[str, list[str]]:
    """Return uv's names of what a project locks, by file of requirements/. A group is resolved without the project.

    Raises ConfigurationError: pyproject.toml cannot be read.
    """
    groups = [GROUP, *(f"{PREFIX}{name}" for name in find_groups(root))]
    return {"dev.txt": ["pyproject.toml", "--extra", "dev"], **{f"{each}.txt": ["--group", each] for each in groups}}


def resolve(root: Path, *, upgrade: bool = False) -> dict[Path, str]:
    """Return the new texts of all lock files of a project, by path; versions that are in the old ones are kept.

    `upgrade`: use the newest versions instead.
    Raises ConfigurationError: uv found no solution, or no index; the text is uv's.
    """
    # A package in the project's own repository is installed from there, where a hash means nothing.
    # Git may leave a folder that has only ignored files
    own = [f"--no-emit-package={each}" for each in PACKAGES if (root / "packages" / each / "pyproject.toml").is_file()]
    environment = child_environment("UV_", *NETWORK, UV_SYSTEM_CERTS="1")  # trust what the system trusts
    texts = {}
    with tempfile.TemporaryDirectory() as copy:
        for name, source in locked_files(root).items():
            old, new = root / "requirements" / name, Path(copy, name)
            if old.exists():
                shutil.copyfile(old, new)
            words = [*source, *OPTIONS, *own, *(["--upgrade"] if upgrade else []), "--output-file", str(new)]
            command = [sys.executable, "-m", "uv", "pip", "compile", *words]
            done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise ConfigurationError(f"{name} could not be resolved. uv says:\n{done.stderr.strip()}")
            texts[old] = read_text(new)
    return texts


def _compare(old: Path, new: str) -> list[str]:
    """Return the lines in which a file differs from a text."""
    before = read_text(old).splitlines() if old.exists() else []
    return list(difflib.unified_diff(before, new.splitlines(), str(old), "up to date", n=0, lineterm=""))


@dataclass(frozen=True)
class Entry:
    """A package in a lock file."""

    name: str  # of the package
    lines: str  # its requirement and hashes, as they are in the file
    parents: tuple[str, ...]  # who requires it


def parse(text: str) -> list[Entry]:
    entries = []
    for block, name in re.findall(r"^(([\w.-]+).*\n(?: .*\n)*)", text, re.MULTILINE):
        parents = re.findall(r"^    #(?: via|  ) (\S.*)$", block, re.MULTILINE)
        entries.append(Entry(name, re.sub(r"^    #.*\n", "", block, flags=re.MULTILINE), tuple(parents)))
    return entries


def without(entries: Iterable[Entry], names: set[str]) -> list[Entry]:
    """Return the entries less the direct requirements with these names, and less what only those required."""
    kept = [
        replace(
            each, parents=tuple(parent for parent in each.parents if each.name not in names or DIRECT not in parent)
        )
        for each in entries
    ]
    while True:
        left = {each.name for each in kept if each.parents}
        fewer = [
            replace(each, parents=tuple(parent for parent in each.parents if DIRECT in parent or parent in left))
            for each in kept
            if each.parents
        ]
        if fewer == kept:
            return kept
        kept = fewer


def render(entries: Iterable[Entry], old: str, new: str) -> str:
    """Return the text of a lock file as uv writes it, with the project renamed."""
    text = ""
    for each in entries:
        renamed = (parent.replace(old, new) for parent in each.parents)
        parents = sorted(renamed, key=lambda parent: (DIRECT not in parent, parent))
        between = " " if len(parents) == 1 else "\n    #   "
        text += "".join([f"{each.lines}    # via", *(f"{between}{parent}" for parent in parents), "\n"])
    return text
