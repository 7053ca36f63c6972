"""What CI leaves out: the simulated site's own tests, if this commit does not change the site."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from support import ROOT

LEFT_OUT = "--ignore-glob=packages/slurm-in-a-box/tests/*\n"


class Checkout:
    """A repository with a main branch at a remote, and a commit on top of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.git("init", "-q", "-b", "main")
        self.first = self.commit("packages/slurm-in-a-box/site.py")
        self.second = self.commit("README.md")

    def git(self, *words: str) -> str:
        identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        done = subprocess.run(["git", *identity, *words], cwd=self.folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def commit(self, path: str) -> str:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{file.read_text() if file.exists() else ''}more\n")
        self.git("add", path)
        self.git("commit", "-qm", path)
        return self.git("rev-parse", "HEAD")

    def main_is(self, commit: str) -> None:
        self.git("update-ref", "refs/remotes/origin/main", commit)

    def options(self, **variables: str) -> str:
        environment = {"PATH": os.environ["PATH"], **variables}
        done = subprocess.run(
            [str(ROOT / ".ci" / "test-options")], cwd=self.folder, env=environment, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_a_branch_is_compared_with_main(checkout: Checkout) -> None:
    checkout.main_is(checkout.first)
    assert checkout.options() == LEFT_OUT
    checkout.commit("packages/slurm-in-a-box/site.py")
    checkout.commit("README.md")
    assert checkout.options() == ""


def test_main_is_compared_with_the_commit_before(checkout: Checkout) -> None:
    checkout.main_is(checkout.second)
    assert checkout.options() == LEFT_OUT
    checkout.main_is(checkout.commit("packages/slurm-in-a-box/site.py"))
    assert checkout.options() == ""


def test_several_commits_at_once_are_compared_with_what_was_before_them(checkout: Checkout) -> None:
    checkout.commit("packages/slurm-in-a-box/site.py")
    checkout.main_is(checkout.commit("README.md"))
    assert checkout.options() == LEFT_OUT  # without the variable, only the last one counts
    assert checkout.options(CI_BASE=checkout.second) == ""


def test_without_a_main_to_compare_with_all_tests_run(checkout: Checkout) -> None:
    assert checkout.options() == ""
    assert checkout.options(CI_BASE=checkout.first) == LEFT_OUT


def test_the_option_leaves_out_the_tests_of_the_site_and_no_others(tmp_path: Path) -> None:
    """In a repository with the same configuration of pytest, and one test in each folder of tests."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["testpaths"]
    assert all((ROOT / folder).is_dir() for folder in folders)
    for number, folder in enumerate(folders):
        (tmp_path / folder / "unit").mkdir(parents=True)
        (tmp_path / folder / "unit" / f"test_{number}.py").write_text("def test() -> None: pass\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", LEFT_OUT.strip()], cwd=tmp_path,
        env={**os.environ, "PYTEST_ADDOPTS": ""}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    left = {folder for folder in folders if f"{folder}/unit/test_" in done.stdout}
    assert left == set(folders) - {"packages/slurm-in-a-box/tests"} != set(folders)
