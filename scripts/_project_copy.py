"""Makes a project of one's own from what git tracks here, without the example: the work of `scripts/new_project`."""

import ast
import fnmatch
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import _example
from dagster_sbatch.children import child_environment
from dagster_sbatch.commands import lock
from dagster_sbatch.errors import ConfigurationError

OLD_PACKAGE, OLD_PROJECT = "musica_pipelines", "musica-pipelines"
SKELETON = Path("scripts/_skeleton")


class CopyError(Exception):
    """The copy cannot be made; the text says why and what to do."""


@dataclass(frozen=True)
class Names:
    """What a copy is called.

    Attributes:
        package: what Python imports, for instance `climate_runs`.
        project: what pip and pixi say, for instance `climate-runs`.
    """

    package: str
    project: str


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder, whatever repository this process was started in; what it printed.

    Raises:
        CopyError: it failed.
    """
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise CopyError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout


def tracked(root: Path) -> list[str]:
    """Every path that git tracks in the template, relative to it.

    Raises:
        CopyError: one of them is not there, or git does not know the folder.
    """
    paths = [path for path in git(root, "ls-files", "-z").split("\0") if path]
    gone = [path for path in paths if not os.path.lexists(root / path)]
    if gone:
        raise CopyError(f"git tracks files that are not there: {', '.join(gone)}. Bring them back: git restore .")
    return paths


def make_copy(root: Path, target: Path, names: Names, site: str, tell: Callable[[str], None]) -> None:
    """Make the project; at any failure and interrupt, nothing is left.

    Args:
        root: the template.
        target: folder that is not there yet.
        names: of the copy.
        site: `envs/.env.<site>` is begun from its example.
        tell: takes what is being done, in words.

    Raises:
        CopyError: something failed.
    """
    paths = tracked(root)
    with _whole_or_not_at_all(target) as folder:
        tell("copying what git tracks")
        _write_files(root, folder, paths, names)
        _tidy_imports(folder)
        tell("locking the dependencies")
        _lock(folder)
        tell("a first commit")
        _commit(folder)
        own = folder / "envs" / f".env.{site}"
        shutil.copyfile(own.with_name(f".env.{site}.example"), own)
        own.chmod(0o600)


@contextmanager
def _whole_or_not_at_all(target: Path) -> Iterator[Path]:
    """A folder beside the target that becomes it at the end, or vanishes."""
    made = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        made.mkdir()
        yield made
        made.rename(target)
    except OSError as error:
        raise CopyError(f"{target} cannot be made: {error}") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _write_files(root: Path, folder: Path, paths: list[str], names: Names) -> None:
    left_out = {path for path in paths if any(fnmatch.fnmatch(path, pattern) for pattern in _example.LEFT_OUT)}
    for path in paths:
        if path not in left_out:
            _write_file(root / path, folder / _rename(path, names), _edit_of(path, left_out, names))
    for path in paths:
        if path.startswith(f"{SKELETON}/"):
            place = folder / _rename(path.removeprefix(f"{SKELETON}/"), names)
            _write_file(root / path, place, lambda text: _rename(text, names))


def _write_file(source: Path, place: Path, edit: Callable[[str], str]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    content = source.read_bytes()
    with suppress(UnicodeDecodeError):  # a picture stays as it is
        content = edit(content.decode()).encode()
    place.write_bytes(content)
    place.chmod(stat.S_IMODE(source.stat().st_mode) | stat.S_IWUSR)


def _edit_of(path: str, left_out: set[str], names: Names) -> Callable[[str], str]:
    """What is done to the text of a file that stays."""

    def edit(text: str) -> str:
        for name in _example.DEFINITIONS.get(path, ()):
            text = _without_definition(path, text, name)
        for old, new in _example.TEXTS.get(path, ()):
            if text.count(old) != 1:
                raise CopyError(f"{path} does not have this passage once, correct scripts/_example.py:\n{old}")
            text = text.replace(old, new)
        if path in ("pyproject.toml", "pixi.toml"):
            text = _without_items(_without_dependencies(text), left_out | set(_example.ITEMS))
        for old, new in _example.RENAMED.items():
            text = text.replace(old, new)
        return _rename(text, names)

    return edit


def _rename(text: str, names: Names) -> str:
    return text.replace(OLD_PACKAGE, names.package).replace(OLD_PROJECT, names.project)


def _without_definition(path: str, text: str, name: str) -> str:
    """A module's text without one function, its decorators included."""
    found = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == name]
    if not found:
        raise CopyError(f"{path} has no function {name}: correct scripts/_example.py")
    (node,) = found
    begin = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    lines = text.splitlines(keepends=True)
    return "".join([*lines[: begin - 1], *lines[node.end_lineno :]])


def _without_dependencies(text: str) -> str:
    """Requirements stand one a line."""
    names = "|".join(map(re.escape, _example.DEPENDENCIES))
    return re.sub(rf'^ *"({names})(?![\w-])[^"]*",.*\n', "", text, flags=re.MULTILINE)


def _without_items(text: str, items: set[str]) -> str:
    """Neither items of lists, which are paths and names, nor pixi's tasks that call such a script."""
    for item in map(re.escape, sorted(items)):
        text = re.sub(rf', "{item}"|"{item}", ?', "", text)
        text = re.sub(rf"^\w+ = .*python {item}\".*\n", "", text, flags=re.MULTILINE)
    return text


def _tidy_imports(folder: Path) -> None:
    """What was taken out leaves imports behind, and other names sort differently."""
    for command in (["check", "--fix", "--select", "F401,I001"], ["format"]):
        _run(folder, "ruff", *command, "--quiet", "--no-cache", "--no-respect-gitignore", ".")


def _run(folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=folder, env=child_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise CopyError(f"`{' '.join(command)}` failed:\n{done.stdout}{done.stderr}".strip())


def _lock(folder: Path) -> None:
    """The versions of the template, less those of the example."""
    try:
        lock.resolve(folder, folder / "requirements")
    except ConfigurationError as error:
        raise CopyError(str(error)) from None


def _commit(folder: Path) -> None:
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "add", "--all")
    identity: list[str] = []
    try:
        git(folder, "var", "GIT_AUTHOR_IDENT")
    except CopyError:  # git has not been told who its user is
        identity = ["-c", "user.name=new_project", "-c", "user.email=new_project@localhost"]
    git(folder, *identity, "commit", "--quiet", "--message", "The template, without its example")
