"""Assets link to their source code: the file, and its page where the commit was pushed to a forge."""

import importlib.util
import subprocess
from pathlib import Path

import dagster as dg
import pytest

from dagster_sbatch import link_to_source
from dagster_sbatch.inspect.source_links import forge_page

MODULE = """\
import dagster as dg

@dg.asset
def counts() -> None:
    pass
"""


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=me", "-c", "user.email=me@localhost")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project in a subfolder of a git repository."""
    folder = tmp_path / "ours" / "project"
    folder.mkdir(parents=True)
    (folder / "counts.py").write_text(MODULE)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message", "one")
    return folder


def links(project: Path) -> list[str]:
    """What the UI links the project's asset to."""
    spec = importlib.util.spec_from_file_location("counts", project / "counts.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (asset,) = link_to_source(dg.load_assets_from_modules([module]), project)
    value = asset.metadata_by_key[dg.AssetKey("counts")]["dagster/code_references"]
    return [each.source for each in value.code_references]


def test_a_pushed_commit_is_linked_to_its_page_and_the_file(project: Path) -> None:
    git(project, "remote", "add", "origin", "git@github.com:group/runs.git")
    git(project, "update-ref", "refs/remotes/origin/main", "HEAD")
    commit = git(project, "rev-parse", "HEAD")
    page = f"https://github.com/group/runs/tree/{commit}/ours/project/counts.py#L3"
    assert links(project) == [page, f"{project}/counts.py:3"]


def test_a_commit_that_was_not_pushed_has_no_page(project: Path) -> None:
    git(project, "remote", "add", "origin", "git@github.com:group/runs.git")
    git(project, "update-ref", "refs/remotes/origin/main", "HEAD")
    git(project, "commit", "--quiet", "--allow-empty", "--message", "two")
    assert links(project) == [f"{project}/counts.py:3"]


def test_without_git_the_file_is_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "counts.py").write_text(MODULE)
    assert links(tmp_path) == [f"{tmp_path}/counts.py:3"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert links(tmp_path) == [f"{tmp_path}/counts.py:3"]


@pytest.mark.parametrize(
    ("remote", "page"),
    [
        ("https://github.com/group/runs.git", ("https://github.com/group/runs", "github")),
        ("https://me:ghp_secret@github.com/group/runs", ("https://github.com/group/runs", "github")),
        (
            "ssh://git@gitlab.example.org:2222/group/sub/runs.git",
            ("https://gitlab.example.org/group/sub/runs", "gitlab"),
        ),
        ("me@gitlab.example.org:group/runs.git/", ("https://gitlab.example.org/group/runs", "gitlab")),
        ("https://github.com/group/gitlab-runs", ("https://github.com/group/gitlab-runs", "github")),
        ("https://git.example.org/group/runs", None),
        ("/srv/github/runs.git", None),
        ("", None),
    ],
)
def test_the_page_of_a_remote(remote: str, page: tuple[str, str] | None) -> None:
    assert forge_page(remote) == page
