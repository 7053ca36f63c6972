"""A project of its own, made from what git tracks in the template, without the example."""

import fnmatch
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dagster_sbatch.children import child_environment
from dagster_sbatch.commands import lock
from dagster_sbatch.commands.signals import ignore_interrupts
from dagster_sbatch.commands.vendored import PACKAGES, SOURCES, Wheel, build_wheel, rename_wheels
from dagster_sbatch.environments.code import ask_git, run_git
from dagster_sbatch.environments.groups import find_requirements
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.text_file import read_text, write_text

OLD_PACKAGE, OLD_PROJECT = "musica_pipelines", "musica-pipelines"
SKELETON = Path("scripts/_skeleton")
MESSAGE = "The template, without its example"  # of the first commit


@dataclass(frozen=True)
class Template:
    """What a copy is made from."""

    root: Path  # its folder
    left_out: Sequence[str]  # patterns of the paths that a copy does not have (fnmatch); SKELETON replaces them


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder, without hooks, whatever repository this process was started in; return what it printed.

    Raises ConfigurationError: it failed.
    """
    done = run_git(folder, "-c", "core.hooksPath=/dev/null", *arguments)
    if done is None or done.returncode:
        said = done.stderr.strip() if done else "git is not installed"
        raise ConfigurationError(f"`git {' '.join(arguments)}` in {folder} failed: {said}")
    return done.stdout


def tracked(root: Path) -> list[str]:
    """Return every path that git tracks in the template, relative to it.

    Raises ConfigurationError: one of them is missing, or git does not know the folder.
    """
    paths = [path for path in git(root, "ls-files", "-z").split("\0") if path]
    if not paths:
        raise ConfigurationError(f"git tracks no files of {root}. Clone the template, or add its files: git add --all")
    gone = [path for path in paths if not os.path.lexists(root / path)]
    if gone:
        raise ConfigurationError(f"git tracks files that are missing: {', '.join(gone)}. Restore them: git restore .")
    return paths


def make_copy(target: Path, template: Template, project: str, site: str, report: Callable[[str], None]) -> None:
    """Make the project. A failure and an interrupt leave nothing.

    `target`: a folder that does not exist yet. `project`: what pip calls it, for instance `climate-runs`; then
    Python imports it as `climate_runs`. `site`: `envs/.env.<site>` starts from its example.
    Raises ConfigurationError: something failed.
    """
    with _whole_or_not_at_all(target) as folder:
        _make(template, folder, project, report)
        _begin_history(folder)
        begin_settings(folder, site)


def convert(template: Template, project: str, site: str, report: Callable[[str], None]) -> None:
    """Turn a clone of the template into the project, in one commit on its current branch.

    The commit is made first, from a copy elsewhere. Then git exchanges the files, unless that would change one that is
    in no commit. The branch gets the commit last.

    `template`: the clone, without uncommitted changes.
    Raises ConfigurationError: something failed; the clone is as it was.
    """
    root = template.root
    changed = git(root, "--no-optional-locks", "status", "--porcelain", "--untracked-files=all")
    if changed:
        raise ConfigurationError(
            f"{root} has changes that are not committed:\n{changed}Commit them, or make a copy elsewhere."
        )
    head = git(root, "rev-parse", "HEAD").strip()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "copy"
            folder.mkdir()
            _make(template, folder, project, report)
            _begin_history(folder)
            git(root, "fetch", "--quiet", str(folder), "HEAD")
    except OSError as error:
        raise ConfigurationError(f"The project cannot be made in a temporary folder: {error}.") from None
    commit = _commit(root, git(root, "rev-parse", "FETCH_HEAD^{tree}").strip(), "-p", head)
    added = git(root, "diff-tree", "-r", "--name-only", "--no-renames", "--diff-filter=A", "-z", head, commit)
    # git would replace a file that it ignores.
    in_the_way = [path for path in added.split("\0") if path and os.path.lexists(root / path)]
    if in_the_way:
        raise ConfigurationError(
            f"{root} has files that the project would replace: {', '.join(in_the_way)}. Move them away."
        )
    ignore_interrupts()
    with suppress(ConfigurationError):  # read-tree names what has changed
        git(root, "update-index", "-q", "--refresh")
    git(root, "read-tree", "-m", "-u", head, commit)  # leaves what git ignores: .venv and dotenv files
    try:
        git(root, "update-ref", "-m", MESSAGE, "HEAD", commit, head)
    except ConfigurationError:
        git(root, "read-tree", "-m", "-u", commit, head)
        raise
    with suppress(ConfigurationError):
        git(root, "clean", "-fdqX", "packages")  # what git ignores there, such as __pycache__
    begin_settings(root, site)


def begin_settings(folder: Path, site: str) -> None:
    """Start the site's dotenv file, unless it exists; git does not track it."""
    own = folder / "envs" / f".env.{site}"
    if not own.exists():
        shutil.copyfile(own.with_name(f".env.{site}.example"), own)
        own.chmod(0o600)


@contextmanager
def _whole_or_not_at_all(target: Path) -> Iterator[Path]:
    """Yield a folder beside the target; at the end it becomes the target, or it is removed after an error."""
    made = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        made.mkdir()
        yield made
        made.rename(target)
    except OSError as error:
        raise ConfigurationError(f"{target} cannot be made: {error}") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _make(template: Template, folder: Path, project: str, report: Callable[[str], None]) -> None:
    """Write all files of the project into an empty folder."""
    report("copying the files of the template")
    _write_files(template, folder, project)
    report("building the wheels of the engine")
    (folder / "vendor").mkdir()
    wheels = {name: build_wheel(template.root / "packages" / name, folder / "vendor") for name in PACKAGES}
    report("locking the dependencies")
    for path in (folder / name for name in SOURCES):
        write_text(path, rename_wheels(read_text(path), wheels))
    _write_locks(template.root, folder, project, wheels)
    # Other names sort differently.
    _run(folder, "ruff", "check", "--fix", "--select", "I001", "--quiet", "--no-cache", ".")
    _run(folder, "ruff", "format", "--quiet", "--no-cache", ".")


def _write_files(template: Template, folder: Path, project: str) -> None:
    root, paths = template.root, tracked(template.root)
    words = {OLD_PACKAGE: project.replace("-", "_"), OLD_PROJECT: project}
    for path in paths:
        if not any(fnmatch.fnmatch(path, pattern) for pattern in template.left_out):
            _write_file(root / path, folder / _rename(path, words), words)
    for path in paths:
        if Path(path).is_relative_to(SKELETON):
            place = _rename(str(Path(path).relative_to(SKELETON)), words)
            _write_file(root / path, folder / place, words)


def _write_file(source: Path, place: Path, words: Mapping[str, str]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    content = source.read_bytes()
    with suppress(UnicodeDecodeError):  # a picture stays as it is
        content = _rename(content.decode(), words).encode()
    place.write_bytes(content)
    place.chmod(stat.S_IMODE(source.stat().st_mode) | stat.S_IWUSR)


def _rename(text: str, words: Mapping[str, str]) -> str:
    for old, new in words.items():
        text = text.replace(old, new)
    return text


def _write_locks(root: Path, folder: Path, project: str, wheels: Mapping[str, Wheel]) -> None:
    """Lock the versions of the template, less those that only its other requirements need."""
    gone = find_requirements(root) - find_requirements(folder)
    (folder / "requirements").mkdir(exist_ok=True)
    for name in lock.locked_files(folder):
        entries = lock.parse(read_text(root / "requirements" / name))
        if name == "dev.txt":  # with those of wheels in vendor/, which the project requires itself
            by = (f"{OLD_PROJECT} {lock.DIRECT})",)
            entries += [lock.Entry(each, f"{wheel.requirement}\n", by) for each, wheel in wheels.items()]
            entries.sort(key=lambda each: each.name)
        text = lock.render(lock.without(entries, gone), OLD_PROJECT, project)
        write_text(folder / "requirements" / name, text)


def _run(folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=folder, env=child_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigurationError(f"`{' '.join(command)}` failed:\n{done.stdout}{done.stderr}".strip())


def _begin_history(folder: Path) -> None:
    """Make a repository with one commit of all files there."""
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "add", "--all", "--force")  # whatever else the user's git ignores
    git(folder, "update-ref", "HEAD", _commit(folder, git(folder, "write-tree").strip()))


def _commit(folder: Path, tree: str, *options: str) -> str:
    """Make a commit of a tree, on no branch yet, without hooks; return its name."""
    known = ask_git(folder, "var", "GIT_AUTHOR_IDENT")  # its user
    identity = [] if known else ["-c", "user.name=new_project", "-c", "user.email=new_project@localhost"]
    return git(folder, *identity, "commit-tree", tree, "-m", MESSAGE, *options).strip()
