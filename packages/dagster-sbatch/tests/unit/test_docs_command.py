"""`scripts/docs`: the pages of the installed engine."""

import subprocess
import sys

import pytest

from dagster_sbatch.commands import docs


def show(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["scripts/docs", *arguments])
    return docs.main()


def test_the_list_has_every_page_with_its_title(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    pages = sorted(docs.docs_folder().glob("*.md"))
    assert lines[-1] == f"The files are in {docs.docs_folder()}"
    assert len(lines) == len(pages) + 2
    assert any(line.split(maxsplit=1) == ["assets", "Writing assets and workloads"] for line in lines)


@pytest.mark.parametrize("name", ["ray", "ray.md", "docs/ray.md"])
def test_a_page_is_shown(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(monkeypatch, name) == 0
    assert capsys.readouterr().out == (docs.docs_folder() / "ray.md").read_text()


def test_pages_are_utf8_in_any_locale() -> None:
    program = "from dagster_sbatch.commands import docs; raise SystemExit(docs.main())"
    environment = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    for arguments in ([], ["runs"]):
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.decode()


def test_a_page_that_does_not_exist_names_one_that_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(monkeypatch, "setings") == 1
    errors = capsys.readouterr().err
    assert "did you mean 'settings'?" in errors
    assert errors.endswith("\n  scripts/docs\n")
