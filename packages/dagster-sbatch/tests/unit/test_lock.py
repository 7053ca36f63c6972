"""scripts/lock, by the real uv, without any index."""

import sys
from pathlib import Path

import pytest

from dagster_sbatch.commands import lock
from dagster_sbatch.environments.groups import read_group
from dagster_sbatch.project import Project
from support import ROOT
from support.environments import make_wheels

PROJECT = """\
[project]
name = "demo"
version = "1"
requires-python = ">=3.11"
[project.optional-dependencies]
dev = [{dev}]
[dependency-groups]
cluster = [{cluster}]
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project without dependencies, and an index that has one package, `tiny`."""
    (tmp_path / "requirements").mkdir()
    (tmp_path / "index").mkdir()
    make_wheels(tmp_path / "index", "tiny", ["py3-none-any"])
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("UV_FIND_LINKS", str(tmp_path / "index"))
    need(tmp_path)
    return Project(tmp_path)


def need(root: Path, dev: str = "", cluster: str = "") -> None:
    (root / "pyproject.toml").write_text(PROJECT.format(dev=dev, cluster=cluster))


def run(project: Project, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["scripts/lock", *options])
    return lock.main(project)


def test_the_check_prints_what_is_not_locked_and_changes_nothing(
    project: Project, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(project, monkeypatch) == 0
    assert run(project, monkeypatch, "--check") == 0
    need(project.root, cluster='"tiny"')
    before = project.lock.read_text()
    assert run(project, monkeypatch, "--check") == 1
    printed = capfd.readouterr().out
    assert "+tiny==1.0 \\" in printed
    assert printed.endswith("Update it:\nscripts/lock\n")
    assert project.lock.read_text() == before
    assert run(project, monkeypatch) == 0
    assert "--hash=sha256:" in project.lock.read_text()
    assert run(project, monkeypatch, "--check") == 0


def test_each_group_of_the_supercomputer_is_locked_and_checked(
    project: Project, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(project, monkeypatch) == 0
    with (project.root / "pyproject.toml").open("a") as file:
        file.write('cluster-extra = [{include-group = "cluster"}, "tiny"]\n')
    extra = project.root / "requirements" / "cluster-extra.txt"
    assert run(project, monkeypatch, "--check") == 1
    assert "+tiny==1.0 \\" in capfd.readouterr().out
    assert not extra.exists()
    assert run(project, monkeypatch) == 0
    assert [pin.text for pin in read_group(project, "extra").pins] == ["tiny==1.0"]
    assert run(project, monkeypatch, "--check") == 0


def test_uv_trusts_what_the_system_trusts(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """uv refuses a variable of its own that has no meaning; so the command has set this one itself."""
    monkeypatch.setenv("UV_SYSTEM_CERTS", "nonsense")
    assert run(project, monkeypatch) == 0


def test_what_cannot_be_resolved_is_reported_in_uvs_words_and_changes_nothing(
    project: Project, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(project, monkeypatch) == 0
    before = {path: path.read_text() for path in (project.root / "requirements").iterdir()}
    need(project.root, dev='"tiny"', cluster='"tiny>1"')
    assert run(project, monkeypatch) == 1
    error = capfd.readouterr().err
    assert error.startswith("cluster.txt could not be resolved. uv says:\n")
    assert "tiny" in error
    assert {path: path.read_text() for path in (project.root / "requirements").iterdir()} == before


@pytest.mark.parametrize("name", ["alps", "musica-pipelines", "zermatt"])
def test_a_copy_has_the_lock_file_that_uv_would_write(name: str) -> None:
    """Uv names the project before the packages that require something, wherever its name is in the alphabet."""
    text, _, _ = (ROOT / "requirements" / "dev.txt").read_text().partition("\n# The following packages were excluded")
    rendered = lock.render(lock.parse(text), "musica-pipelines", name)
    assert rendered == text.replace("musica-pipelines", name)
