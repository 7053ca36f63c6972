"""`scripts/new_project .`: a clone becomes the project, or stays as it was."""

import errno
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from dagster_sbatch.commands import project_copy
from dagster_sbatch.commands.project_copy import Template, convert
from dagster_sbatch.errors import ConfigurationError
from support.new_project import run_in

pytestmark = [pytest.mark.local, pytest.mark.usefixtures("same_handlers")]


@pytest.fixture
def small_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with little in it; what becomes of it is made in no time."""

    def make(template: Template, folder: Path, *_: object) -> None:
        root = template.root
        for name, text in {
            ".gitignore": "*.log\nenvs/.env.musica\n",
            "README.md": "project\n",
            "new.txt": "",
            "new.log": "",
        }.items():
            (folder / name).write_text(text)
        shutil.copytree(root / "envs", folder / "envs")
        if (root / "person").exists():
            subprocess.run(["sh", root / "person"], cwd=root, check=True)

    monkeypatch.setattr(project_copy, "_make", make)
    root = tmp_path / "clone"
    (root / "envs").mkdir(parents=True)
    for name in (".gitignore", "README.md", "old.txt", "envs/.env.musica.example"):
        (root / name).write_text("*.log\nenvs/.env.musica\n" if name == ".gitignore" else "template\n")
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "template"]):
        identity = ("-c", "user.name=me", "-c", "user.email=me@localhost")
        assert run_in(root, "git", *identity, *command).returncode == 0
    with (root / ".git" / "info" / "exclude").open("a") as file:
        file.write("person\n")
    return root


def become_a_project(root: Path) -> None:
    convert(Template(root, ()), "climate", "musica", lambda _: None)


@pytest.mark.parametrize("name", ["README.md", "old.txt", "new.txt", "new.log"])
def test_a_file_that_changes_meanwhile_is_not_lost(name: str, small_clone: Path) -> None:
    """Modified, or new and in the way of the project's, be it ignored by git or not."""
    (small_clone / "person").write_text(f"echo mine > {name}\n")
    head = run_in(small_clone, "git", "rev-parse", "HEAD").stdout
    with pytest.raises(ConfigurationError, match=re.escape(name)):
        become_a_project(small_clone)
    assert (small_clone / name).read_text() == "mine\n"
    assert run_in(small_clone, "git", "rev-parse", "HEAD").stdout == head
    status = run_in(small_clone, "git", "status", "--porcelain").stdout
    assert status == {"new.txt": "?? new.txt\n", "new.log": ""}.get(name, f" M {name}\n")


def test_untracked_files_count_whatever_git_shows(small_clone: Path) -> None:
    run_in(small_clone, "git", "config", "status.showUntrackedFiles", "no")
    (small_clone / "notes").mkdir()
    (small_clone / "notes" / "mine.txt").touch()
    with pytest.raises(ConfigurationError, match=r"not committed:\n\?\? notes/mine.txt"):
        become_a_project(small_clone)


def test_hooks_and_signatures_do_not_break_it_off(small_clone: Path) -> None:
    """A file that is new meanwhile stays, and is in no commit."""
    for name, value in {"commit.gpgsign": "true", "gpg.program": "false"}.items():
        run_in(small_clone, "git", "config", name, value)
    for name in ("pre-commit", "reference-transaction"):
        (small_clone / ".git" / "hooks" / name).write_text("#!/bin/sh\nexit 1\n")
        (small_clone / ".git" / "hooks" / name).chmod(0o755)
    (small_clone / "person").write_text("echo mine > notes.txt; touch -d 2020-01-01 README.md\n")
    become_a_project(small_clone)
    assert (small_clone / "README.md").read_text() == "project\n"
    assert (small_clone / "notes.txt").read_text() == "mine\n"
    assert run_in(small_clone, "git", "status", "--porcelain").stdout == "?? notes.txt\n"


def test_without_a_commit_it_is_left_alone(small_clone: Path) -> None:
    """As after the download of an archive and `git init`."""
    shutil.rmtree(small_clone / ".git")
    run_in(small_clone, "git", "init", "--quiet")
    with pytest.raises(ConfigurationError, match=r"not committed:\n(.*\n)*\?\? old.txt"):
        become_a_project(small_clone)
    with pytest.raises(ConfigurationError, match="git tracks no files of"):
        project_copy.tracked(small_clone)


def test_a_full_disk_leaves_the_clone_as_it_was(small_clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(project_copy, "_make", full)
    with pytest.raises(ConfigurationError, match="No space left on device"):
        become_a_project(small_clone)
    assert run_in(small_clone, "git", "status", "--porcelain").stdout == ""


def test_a_branch_that_cannot_move_leaves_the_files_as_they_were(small_clone: Path) -> None:
    branch = run_in(small_clone, "git", "symbolic-ref", "HEAD").stdout.strip()
    (small_clone / ".git" / f"{branch}.lock").touch()  # of another git
    with pytest.raises(ConfigurationError, match=f"{branch}.lock': File exists"):
        become_a_project(small_clone)
    assert run_in(small_clone, "git", "status", "--porcelain").stdout == ""
    assert (small_clone / "old.txt").exists()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_an_interrupt_while_git_exchanges_the_files_waits_for_the_end(
    small_clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The terminal sends Ctrl-C to the whole process group."""
    stand_in = tmp_path / "bin" / "git"
    stand_in.parent.mkdir()
    interrupt = 'case "$*" in *read-tree*) kill -s INT -- -$PPID; sleep 0.2;; esac'
    stand_in.write_text(f'#!/bin/sh\n{interrupt}\nexec {shutil.which("git")} "$@"\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
    process = os.fork()
    if process == 0:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            become_a_project(small_clone)
        except BaseException:  # noqa: BLE001 - only the parent is pytest
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert run_in(small_clone, "git", "status", "--porcelain").stdout == ""
    assert (small_clone / "README.md").read_text() == "project\n"
