"""`scripts/new_project`: the copy is whole, has nothing of the example, and works; or it is not made at all."""

import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dagster_sbatch import Project
from dagster_sbatch.commands.new_project import find_problems, main, site_problems
from dagster_sbatch.commands.project_copy import OLD_PACKAGE, OLD_PROJECT
from dagster_sbatch.errors import ConfigurationError
from resources import PROJECT
from support import ROOT
from support.dagster_dev import DagsterDev
from support.new_project import NAME, PACKAGE, SCRIPT, made_in, new_project, plain_environment, run_in

pytestmark = [pytest.mark.local, pytest.mark.usefixtures("same_handlers")]

OFFLINE = {
    "UV_OFFLINE": "1",
    "PIP_NO_INDEX": "1",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "HTTP_PROXY": "http://127.0.0.1:9",
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_in(tmp_path_factory.mktemp("copy"))


def left_over(folder: Path) -> list[str]:
    """Files with a word of the example or a name of the template, in their text or path."""
    from _example import WORDS

    words = re.compile("|".join(map(re.escape, (*WORDS, OLD_PACKAGE, OLD_PROJECT))), re.IGNORECASE)
    found = []
    for name in run_in(folder, "git", "ls-files").stdout.splitlines():
        match = words.search(f"{name}\n{(folder / name).read_bytes().decode(errors='replace')}")
        if match and not name.startswith("vendor/"):
            found.append(f"{name}: {match[0]}")
    return found


def test_nothing_of_the_example_is_left(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails: name the file in scripts/_example.py, or put another one for it into scripts/_skeleton/."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    assert (copy / PACKAGE / "definitions.py").is_file()
    assert left_over(copy) == []


def test_a_copy_is_small_and_has_the_engine_as_wheels(copy: Path) -> None:
    names = run_in(copy, "git", "ls-files").stdout.splitlines()
    assert len(names) <= 50
    assert {f"{PACKAGE}/assets/estimates.py", "jobs/credentials.py", "scripts/upgrade", "scripts/sim"} <= set(names)
    assert {name for name in names if name.startswith("vendor/")} == {
        "vendor/dagster_sbatch-1.0.0-py3-none-any.whl",
        "vendor/slurm_in_a_box-1.0.0-py3-none-any.whl",
    }
    assert (copy / "scripts" / "sim").stat().st_mode & stat.S_IXUSR
    assert not any("flight" in name or name.startswith(("scripts/_skeleton", "packages/")) for name in names)


def test_what_its_pixi_toml_names_is_there(copy: Path) -> None:
    pixi = tomllib.loads((copy / "pixi.toml").read_text())
    paths = {name: each["path"] for name, each in pixi["pypi-dependencies"].items()}
    assert set(paths) == {NAME, "dagster-sbatch", "slurm-in-a-box"}
    assert all((copy / path).exists() for path in paths.values())
    programs, scripts = zip(*(task["cmd"].split() for task in pixi["tasks"].values()), strict=True)
    assert set(programs) == {"python"}
    assert all(os.access(copy / script, os.X_OK) for script in scripts)


def test_its_git_ignores_links_to_other_disks_and_never_a_wheel(copy: Path, tmp_path: Path) -> None:
    """An environment or data on a disk with more room; a user who ignores these names everywhere."""
    (tmp_path / "ignore").write_text("vendor/\n*.whl\n")
    for name in (".venv", ".pixi", ".dagster", "data"):
        (tmp_path / name).symlink_to("/somewhere/else")
    paths = [".venv", ".pixi", ".dagster", "data", "vendor/dagster_sbatch-1.1.0-py3-none-any.whl"]
    (tmp_path / ".gitignore").write_text((copy / ".gitignore").read_text())
    run_in(tmp_path, "git", "init", "--quiet")
    ignored = run_in(tmp_path, "git", "-c", "core.excludesFile=ignore", "check-ignore", *paths).stdout
    assert ignored.split() == paths[:-1]


def test_line_ends_stay_whatever_the_user_has_configured(copy: Path, tmp_path: Path) -> None:
    """A script whose first line ends with a carriage return does not start."""
    for source, name in ((copy, "of-a-copy"), (ROOT, "of-the-template")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dev").write_bytes(b"#!/usr/bin/env python3\n")
        shutil.copy(source / ".gitattributes", tmp_path / name)
        run_in(tmp_path / name, "git", "init", "--quiet")
        run_in(tmp_path / name, "git", "config", "core.autocrlf", "true")
        run_in(tmp_path / name, "git", "add", "--all")
        (tmp_path / name / "dev").unlink()
        run_in(tmp_path / name, "git", "checkout", "dev")
        assert (tmp_path / name / "dev").read_bytes() == b"#!/usr/bin/env python3\n"


def test_its_history_begins(copy: Path) -> None:
    assert run_in(copy, "git", "log", "--format=%s").stdout == "The template, without its example\n"
    assert run_in(copy, "git", "status", "--porcelain").stdout == ""
    own = copy / "envs" / ".env.musica"
    assert stat.S_IMODE(own.stat().st_mode) == 0o600
    assert own.read_text() == (ROOT / "envs" / ".env.musica.example").read_text()


def test_a_copy_is_made_without_a_network_in_seconds(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = new_project(f"./{NAME}", folder=tmp_path, **OFFLINE, UV_CACHE_DIR=str(tmp_path / "cache"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_clone_becomes_the_same_project_in_place(copy: Path, tmp_path: Path) -> None:
    """As after a forge's "Use this template"."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), tmp_path / NAME], check=True)
    clone = tmp_path / NAME
    (clone / ".env").write_text("DAGSTER_DEPLOYMENT=development\n")
    commits = run_in(clone, "git", "log", "--format=%s").stdout
    done = run_in(clone, sys.executable, "scripts/new_project", ".")
    assert done.returncode == 0, done.stderr
    assert run_in(clone, "git", "log", "--format=%s").stdout == f"The template, without its example\n{commits}"
    assert run_in(clone, "git", "status", "--porcelain").stdout == ""
    tree = ("git", "rev-parse", "HEAD^{tree}")
    assert run_in(clone, *tree).stdout == run_in(copy, *tree).stdout
    assert (clone / ".env").exists()
    assert not (clone / "packages").exists()  # git leaves the __pycache__ that the command has made there
    (clone / "packages" / "dagster-sbatch" / "__pycache__").mkdir(parents=True)  # what an older version left
    locked = run_in(clone, sys.executable, "scripts/lock", "--check")  # makes the environment
    assert locked.returncode == 0, locked.stdout + locked.stderr


def test_a_clone_with_changes_is_left_alone(tmp_path: Path) -> None:
    subprocess.run(["git", "clone", "--quiet", str(ROOT), tmp_path / NAME], check=True)
    clone = tmp_path / NAME
    (clone / "README.md").write_text("mine\n")
    done = run_in(clone, sys.executable, "scripts/new_project", ".")
    assert done.returncode == 1
    assert "has changes that are not committed:\n M README.md" in done.stderr
    assert run_in(clone, "git", "status", "--porcelain").stdout == " M README.md\n"


@pytest.mark.timeout(600)
def test_its_tests_and_checks_pass(copy: Path) -> None:
    (copy / ".env").write_text("DAGSTER_DEPLOYMENT=staging_supercomputer\n")  # reaches no test
    tested = run_in(copy, sys.executable, "scripts/test", "-q", "-n", "0", "-m", "not cluster")
    assert tested.returncode == 0, tested.stdout + tested.stderr
    (copy / ".env").unlink()
    programs = copy / ".venv" / "bin"
    checks = [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"], ["dg", "check", "defs"]]
    for program, *arguments in checks:
        done = run_in(copy, str(programs / program), *arguments)
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"
    locked = run_in(copy, sys.executable, "scripts/lock", "--check")
    assert locked.returncode == 0, locked.stdout
    page = run_in(copy, sys.executable, "scripts/docs", "ray")
    assert page.stdout == (ROOT / "packages" / "dagster-sbatch" / "docs" / "ray.md").read_text()
    assert run_in(copy, "git", "status", "--porcelain").stdout == ""


def test_dg_shows_and_runs_its_assets(copy: Path, tmp_path: Path) -> None:
    dg = f"{copy}/.venv/bin/dg"
    assert run_in(copy, sys.executable, "scripts/test", "--version").returncode == 0  # makes the environment
    listed = json.loads(run_in(copy, dg, "list", "defs", "--json").stdout)
    assert {"pi_estimate", "musica_access"} <= {asset["asset_key"] for asset in listed["assets"]}
    server = DagsterDev(copy, plain_environment(DATA_ROOT=str(tmp_path)), [dg, "dev"])
    try:
        server.start()
        assert server.wait(server.launch("pi_estimate", location=PACKAGE)) == "SUCCESS"
    finally:
        server.stop()


def test_the_skeleton_agrees_with_the_template() -> None:
    """What both have is the same: supported versions, requirements, Dagster's own command line."""
    template, skeleton = (
        tomllib.loads((folder / "pyproject.toml").read_text()) for folder in (ROOT, ROOT / "scripts" / "_skeleton")
    )
    for name in ("requires-python", "license", "version"):
        assert skeleton["project"][name] == template["project"][name]
    for table, name in (("project", "dependencies"), ("dependency-groups", "cluster")):
        assert set(skeleton[table][name]) <= set(template[table][name])
    extras = [content["project"]["optional-dependencies"]["dev"] for content in (skeleton, template)]
    assert set(extras[0]) <= set(extras[1])
    assert skeleton["tool"]["dg"] == template["tool"]["dg"]


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (
            ["./Climate Runs"],
            [
                "cannot be used. Use up to 32 small letters and digits, a letter first, with - or _ between "
                "words, for instance climate-runs"
            ],
        ),
        (["./2climate"], ["cannot be used"]),
        (["./climate-"], ["cannot be used"]),
        (["./Klima-Läufe"], ["cannot be used"]),
        (["./" + "c" * 33], ["cannot be used"]),
        (["./class"], ["is a keyword or a module of Python"]),
        (["./json"], ["is a keyword or a module of Python"]),
        (["./test"], ["is a keyword or a module of Python"]),
        (["./resources"], ["is taken by a folder or a package"]),
        (["./dagster"], ["is taken by a folder or a package"]),
        (["./dagster-sbatch"], ["is taken by a folder or a package"]),  # installed from its sources: lists no module
        (["./python_dotenv"], ["is taken by a folder or a package"]),  # its module has another name
        (["./vendor"], ["is taken by a folder or a package"]),
        (["./pi-estimate"], ["is taken by a folder or a package"]),  # the module of the workload
        (["./dist"], ["git ignores a folder dist (.gitignore:"]),
        (["./there"], ["there exists already. Choose another name"]),
        (["./no/such it's/climate"], ["""/no/such it'"'"'s'"""]),
        ([str(ROOT / "climate")], ["would lie within the template"]),
        (["./climate", "--site", "musika"], ["did you mean 'musica'", "another-site"]),
        (["./There", "--site", "x"], ["cannot be used", "There exists", "is not a known site"]),
        ([""], ["the name '' cannot be used", "exists already. Choose another name"]),
    ],
)
def test_all_that_is_wrong_is_told_and_nothing_is_made(
    arguments: list[str],
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("there", "There"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments])
    assert main(PROJECT, ()) == 1
    told = capsys.readouterr().err
    for text in texts:
        assert text in told
    assert len(re.findall("^- ", told, re.M)) == len(texts) - ("another-site" in texts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["There", "there"]
    assert not (ROOT / "climate").exists()


def test_in_place_the_folder_has_to_be_renamed() -> None:
    """A forge takes any name for the repository, and git makes a folder with it."""
    problems = find_problems(Project(ROOT, {"musica": {}}), "My Project", ROOT, "musica", in_place=True)
    assert problems[0].endswith("for instance climate-runs")
    assert problems[1:] == [f"a project that is made in place has the name of its folder: rename {ROOT}"]


def test_git_has_the_example_of_the_sites_dotenv_file(tmp_path: Path) -> None:
    project, example = Project(tmp_path, {"borealis": {}}), tmp_path / "envs" / ".env.borealis.example"
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    assert "write one" in site_problems(project, "borealis")[0]
    example.parent.mkdir()
    example.touch()
    assert site_problems(project, "borealis")[0].endswith("Add it:\n  git add envs/.env.borealis.example")
    subprocess.run(["git", "-C", tmp_path, "add", example], check=True)
    assert site_problems(project, "borealis") == []
    (tmp_path / ".git" / "config").write_text("[broken")  # as with a folder that belongs to another user
    with pytest.raises(ConfigurationError, match="bad config line"):
        site_problems(project, "borealis")


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    """A git that cannot commit."""
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "git"
    stand_in.write_text(
        f'#!/bin/sh\ncase "$*" in *commit*) echo "no space left" >&2; exit 1;; esac\n{shutil.which("git")} "$@"\n'
    )
    stand_in.chmod(0o755)
    done = new_project(f"./{NAME}", folder=tmp_path, PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert done.returncode == 1
    assert "no space left" in done.stderr
    assert "Nothing was made." in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_interrupt_leaves_nothing(tmp_path: Path, number: int) -> None:
    """It comes while git works: here, for as long as it takes."""
    tools, folder = tmp_path / "bin", tmp_path / "projects"
    for each in (tools, folder):
        each.mkdir()
    (tools / "git").write_text(f'#!/bin/sh\ncase "$*" in *commit*) exec sleep 600;; esac\n{shutil.which("git")} "$@"\n')
    (tools / "git").chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, SCRIPT, f"./{NAME}"],
        cwd=folder,
        env=plain_environment() | {"PATH": f"{tools}:{os.environ['PATH']}"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # noqa: PLW1509 - not as under `nohup`
    )
    assert process.stderr
    assert any("building" in line for line in iter(process.stderr.readline, ""))
    assert [path.name for path in folder.iterdir()] == [f".{NAME}.{process.pid}"]
    os.killpg(process.pid, number)  # as Ctrl-C and the end of the terminal do; and a person who is in a hurry
    os.killpg(process.pid, signal.SIGINT)
    assert "Interrupted; nothing was made." in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert list(folder.iterdir()) == []
