"""`scripts/new_project`: the copy is whole, has nothing of the example, and works; or it is not there at all."""

import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import ROOT
from support.new_project import NAME, PACKAGE, SCRIPT, made_in, new_project, plain_environment

pytestmark = pytest.mark.local

QUICK = ["-k", "not pools", "tests/unit/test_definitions.py", "tests/unit/test_docs.py", "tests/unit/test_imports.py",
         "tests/unit/test_pages.py", "tests/unit/test_plain_key.py", "tests/unit/test_preview.py",
         "tests/unit/test_scripts.py::test_a_script_explains_itself_from_any_folder", "tests/local/test_pi_estimate.py",
         "tests/local/test_refresh_job.py::test_the_location_loads_and_the_sensors_run_where_they_are_needed",
         ]  # fmt: skip
"""Those that a copy could break; with STRESS=1 all that need no cluster."""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_in(tmp_path_factory.mktemp("copy"))


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The modules of scripts/ can be imported."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    yield
    for name in ("_example", "_project_copy"):
        sys.modules.pop(name, None)


def left_over(folder: Path) -> list[str]:
    """Files with a word of the example or a name of the template, in their text or path."""
    import _example
    from _project_copy import OLD_PACKAGE, OLD_PROJECT

    words = re.compile("|".join(map(re.escape, (*_example.WORDS, OLD_PACKAGE, OLD_PROJECT))), re.IGNORECASE)
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and name.parts[0] != ".git":
            match = words.search(f"{name}\n{path.read_bytes().decode(errors='replace')}")
            if match:
                found.append(f"{name}: {match[0]}")
    return found


def run_in(folder: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in a copy; uv is on PATH and makes its environment in seconds."""
    environment = plain_environment(PATH=f"{ROOT}/.venv/bin:{os.environ['PATH']}")
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=3000, check=False
    )


@pytest.mark.usefixtures("scripts")
def test_nothing_of_the_example_is_left(copy: Path) -> None:
    """If this fails: name the file, function or passage in scripts/_example.py."""
    assert (copy / PACKAGE / "definitions.py").is_file()
    assert left_over(copy) == []


@pytest.mark.usefixtures("scripts")
def test_a_file_of_the_example_that_nobody_named_is_found(tmp_path: Path) -> None:
    from _project_copy import Names, make_copy

    template = tmp_path / "template"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), template], check=True)
    (template / "tests" / "unit" / "test_more.py").write_text('"""Of Flights."""\n')
    subprocess.run(["git", "-C", template, "add", "--all"], check=True)
    make_copy(template, tmp_path / NAME, Names(PACKAGE, NAME), "musica", lambda _: None)
    assert left_over(tmp_path / NAME) == ["tests/unit/test_more.py: Flight"]


def test_all_that_git_tracks_is_there_or_named_as_left_out(copy: Path) -> None:
    listed = subprocess.run(["git", "-C", copy, "ls-files"], capture_output=True, text=True, check=True)
    names = set(listed.stdout.splitlines())
    for path in ("resources/compute.py", "tests/cluster/test_gateway.py", "docs/credentials.md", "scripts/sim",
                 f"{PACKAGE}/assets/estimates.py", f"{PACKAGE}/workloads/pi_estimate.py"):  # fmt: skip
        assert path in names
    assert (copy / "scripts" / "sim").stat().st_mode & stat.S_IXUSR
    assert not any(path.startswith((f"{PACKAGE}/assets/flight", "scripts/_skeleton", "scripts/demo")) for path in names)


def test_its_history_begins(copy: Path) -> None:
    assert run_in(copy, "git", "log", "--format=%s").stdout == "The template, without its example\n"
    assert run_in(copy, "git", "status", "--porcelain").stdout == ""
    own = copy / "envs" / ".env.musica"
    assert stat.S_IMODE(own.stat().st_mode) == 0o600
    assert own.read_text() == (ROOT / "envs" / ".env.musica.example").read_text()


@pytest.mark.timeout(3600)
def test_its_tests_and_checks_pass(copy: Path) -> None:
    selection = ["-m", "not cluster"] if os.environ.get("STRESS") == "1" else QUICK
    (copy / ".env").write_text("DAGSTER_DEPLOYMENT=staging_supercomputer\n")  # reaches no test
    tested = run_in(copy, sys.executable, "scripts/test", "-q", *selection)
    assert tested.returncode == 0, tested.stdout + tested.stderr
    bin_folder = copy / ".venv" / "bin"
    checks = [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["lint-imports", "--no-cache"], ["vulture"],
              ["deptry", "."], ["mypy", PACKAGE, "jobs", "tests/local/test_pi_estimate.py"],
              ["dagster", "definitions", "validate"]]  # fmt: skip
    for program, *arguments in checks:
        done = run_in(copy, str(bin_folder / program), *arguments)
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"
    locked = run_in(copy, sys.executable, "scripts/lock", "--check")
    assert locked.returncode == 0, locked.stdout
    assert run_in(copy, "git", "status", "--porcelain").stdout == ""


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (
            ["./Climate Runs"],
            [
                "cannot be used: take up to 32 small letters and digits, a letter first, with - or _ between "
                "words, for instance climate-runs"
            ],
        ),
        (["./2climate"], ["for instance climate"]),
        (["./climate-"], ["for instance climate"]),
        (["./--"], ["between words\n"]),
        (["./" + "c" * 33], ["cannot be used"]),
        (["./class"], ["is Python's own"]),
        (["./json"], ["is Python's own"]),
        (["./resources"], ["is taken"]),
        (["./dagster"], ["is taken"]),
        (["./there"], ["there exists: take another name"]),
        (["./no/such/climate"], ["mkdir -p"]),
        ([str(ROOT / "climate")], ["would lie within the template"]),
        (["./climate", "--site", "musika"], ["did you mean 'musica'", "docs/another-site.md"]),
        (["./There", "--site", "x"], ["cannot be used", "There exists", "is not a known site"]),
        ([""], ["the name '' cannot be used", "exists: take another name"]),
    ],
)
def test_all_that_is_wrong_is_told_and_nothing_is_made(arguments: list[str], texts: list[str], tmp_path: Path) -> None:
    for name in ("there", "There"):
        (tmp_path / name).mkdir()
    done = new_project(*arguments, folder=tmp_path)
    assert done.returncode == 1
    for text in texts:
        assert text in done.stderr
    assert len(done.stderr.splitlines()) == len(texts) - ("docs/another-site.md" in texts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["There", "there"]
    assert not (ROOT / "climate").exists()


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    done = new_project(f"./{NAME}", folder=tmp_path, UV_OFFLINE="1", UV_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 1
    assert "the dependencies could not be resolved" in done.stderr
    assert "Nothing was made." in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, SCRIPT, f"./{NAME}"],
        cwd=tmp_path,
        env=plain_environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr
    assert any("locking" in line for line in iter(process.stderr.readline, ""))
    assert [path.name for path in tmp_path.iterdir()] == [f".{NAME}.{process.pid}"]
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does; and a person who is in a hurry
    os.killpg(process.pid, signal.SIGINT)
    assert "Interrupted; nothing was made." in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []
