"""Files of the owner that cannot be read: the error names the file, what is wrong, and what to do."""

import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import dagster as dg
import pytest

from dagster_sbatch.commands import job, lock, upgrade
from dagster_sbatch.commands.new_project import names_in_use
from dagster_sbatch.commands.project_copy import OLD_PACKAGE, SKELETON
from dagster_sbatch.commands.project_history import open_history
from dagster_sbatch.environments.groups import find_groups, find_requirements, read_group
from dagster_sbatch.environments.lockfile import read_lock
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.inspect.diagnosis.finding import Facts
from dagster_sbatch.inspect.diagnosis.this_machine import check_dagster_home
from dagster_sbatch.inspect.remote_runs import Runs
from dagster_sbatch.project import Project
from dagster_sbatch.setting_files import load_settings

PYPROJECT = """\
[project]
dependencies = ["Dagster>=1", "dagster-sbatch @ ./vendor/dagster_sbatch-1.0.0-py3-none-any.whl"]
optional-dependencies.dev = ["ruff"]
[dependency-groups]
cluster = [{include-group = "base"}]
base = ["dagster-pipes"]
"""
SAVE = "is not in UTF-8. Save the file in UTF-8."


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project whose engine is a wheel, with each file that the engine reads."""
    (tmp_path / "vendor").mkdir()
    (tmp_path / "vendor" / "dagster_sbatch-1.0.0-py3-none-any.whl").touch()
    (tmp_path / "requirements").mkdir()
    (tmp_path / "envs").mkdir()
    (tmp_path / SKELETON / OLD_PACKAGE / "workloads").mkdir(parents=True)
    for name in (".env", "envs/.env.development", "pixi.toml", "requirements/dev.txt", "requirements/cluster.txt"):
        (tmp_path / name).touch()
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    return tmp_path


def settings(root: Path) -> None:
    load_settings((), root)


def locked_packages(root: Path) -> None:
    read_lock(Project(root).lock)


READERS: dict[str, list[Callable[[Path], object]]] = {
    ".env": [settings],
    "envs/.env.development": [settings],
    "requirements/cluster.txt": [locked_packages, lock.check, names_in_use],
    "pyproject.toml": [find_groups, find_requirements, lock.check],
}


@pytest.mark.parametrize(("name", "read"), [(name, read) for name, readers in READERS.items() for read in readers])
def test_a_file_that_is_not_in_utf_8(
    name: str, read: Callable[[Path], object], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        lock, "resolve", lambda root: {root / "requirements" / each: "" for each in lock.locked_files(root)}
    )  # uv has errors of its own
    monkeypatch.setattr(lock, "locked_files", lambda root: find_groups(root) or ["cluster.txt"])
    read(root)
    before = (root / name).read_bytes()
    (root / name).write_bytes(before + "\n# für alle\n".encode("latin-1"))
    line = before.count(b"\n") + 2
    with pytest.raises(ConfigurationError, match=f"^{re.escape(str(root / name))} cannot be read: line {line} {SAVE}$"):
        read(root)


@pytest.mark.parametrize("name", ["pyproject.toml", "pixi.toml", "requirements/dev.txt"])
def test_an_upgrade_of_a_project_with_such_a_file_changes_nothing(
    name: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / name).write_bytes(b"\xfc")
    monkeypatch.setattr(sys, "argv", ["scripts/upgrade", "1.1.0"])
    assert upgrade.main(root) == 1
    assert capsys.readouterr().err == f"{root / name} cannot be read: line 1 {SAVE}\nNothing was changed.\n"


def test_the_requirements_are_those_of_this_machine_and_of_the_supercomputer(root: Path) -> None:
    assert find_requirements(root) == {"dagster", "dagster-sbatch", "ruff", "dagster-pipes"}


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("[project]", "[project", r"cannot be read: .*line 1.*\. Correct the file\.$"),
        ("[dependency-groups]", "[[dependency-groups]]", r"dependency-groups is not a table\. Write \[depend"),
        ("cluster = [", 'cluster = "x"\nother = [', "'cluster' contained a string rather than a list.*Correct"),
        ("cluster = [", "other = [", "Dependency group 'cluster' not found.*Correct"),
        ("[project]", "[projects]", r"cannot be read: 'project'\. Correct"),
        (".dev", ".tests", r"cannot be read: 'dev'\. Correct"),
        ('"Dagster>=1"', "1", r"cannot be read: .*\. Correct"),
        ('"Dagster>=1"', '"Dagster=>1"', r"cannot be read: .*\. Correct"),
        ('["ruff"]', "5", r"cannot be read: .*\. Correct"),
    ],
)
def test_a_pyproject_of_another_shape(old: str, new: str, text: str, root: Path) -> None:
    (root / "pyproject.toml").write_text(PYPROJECT.replace(old, new, 1))
    with pytest.raises(ConfigurationError, match=rf"(?s)pyproject\.toml.*{text}"):
        find_requirements(root)


@pytest.mark.parametrize("read", [find_groups, lambda root: read_group(Project(root), None)])
def test_groups_that_are_no_table_are_refused_before_a_job(read: Callable[[Path], object], root: Path) -> None:
    (root / "pyproject.toml").write_text("dependency-groups = []\n")
    with pytest.raises(ConfigurationError, match=r"pyproject\.toml: dependency-groups is not a table"):
        read(root)


@pytest.mark.parametrize("content", [b"\xfc", b"]]]= {", b"storage: {module: none}"])
def test_a_dagster_yaml_that_cannot_be_used_is_named(
    content: bytes, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "dagster.yaml").write_bytes(content)
    monkeypatch.chdir(root)
    monkeypatch.setenv("DAGSTER_HOME", str(root))
    with pytest.raises(ConfigurationError, match=f"\nCorrect {root}/dagster.yaml, or what it names"):
        job.show_left(Project(root), cast(Runs, None))
    with open_history(Project(root)) as history:
        assert history is None
    assert "What earlier runs have used is not known. Dagster's history cannot be opened" in capsys.readouterr().err
    with ExitStack() as stack:
        state, _, fix = check_dagster_home(Facts(Project(root), dg.DagsterInstance.get, stack))
    assert (state, fix) == ("broken", f"correct {root}/dagster.yaml, or what it names")


def test_a_variable_that_dagster_yaml_names_and_that_is_not_set_is_named_without_a_stack(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for the commands of a person whose Dagster runs as a service, with the address of its database."""
    (root / "dagster.yaml").write_text("storage: {sqlite: {base_dir: {env: NOT_SET}}}\n")
    monkeypatch.chdir(root)
    monkeypatch.setenv("DAGSTER_HOME", str(root))
    text = 'You have attempted to fetch the environment variable "NOT_SET" which is not set'
    with pytest.raises(ConfigurationError, match=rf"opened: {text}[^\n]*\nCorrect [^\n]*$"):
        job.show_left(Project(root), cast(Runs, None))
    with ExitStack() as stack:
        _, found, _ = check_dagster_home(Facts(Project(root), dg.DagsterInstance.get, stack))
    assert found.startswith(f"DAGSTER_HOME={root} cannot be used: {text}")
    assert "\n" not in found
