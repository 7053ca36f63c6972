"""Imports that cannot work, on the supercomputer or everywhere."""

import gc
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dagster_sbatch.launchers import CommandLauncher, Launcher, ScriptLauncher
from dagster_sbatch.run.imports import find_missing
from dagster_sbatch.run.plan import make_plan
from dagster_sbatch.run.workload import read_workload
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import SlurmRequest
from resources import PROJECT

WORKLOADS = PROJECT.workloads


def missing(folder: Path, text: str, *, own_packages: bool = False) -> list[str]:
    (folder / "prog.py").write_text(text)
    lock = None if own_packages else PROJECT.lock
    return find_missing(read_workload(folder / "prog.py", [], WORKLOADS), PROJECT, lock)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import resources", "it is outside the code root"),
        (
            "from dagster_sbatch import Site",
            "it runs beside Dagster, and is not sent. A workload needs dagster_pipes only.",
        ),
        ("import os, musica_pipelines.assets as a", "it is outside the code root"),
        ("def f():\n    import tests", "it is outside the code root"),
        ("import dagster", "the package dagster is not in cluster.txt. Add it"),
        ("import dagster_graphql.client", "the package dagster-graphql is not in cluster.txt"),
        ("from dotenv import load_dotenv", "the package python-dotenv is not in cluster.txt"),
        ("if True:\n    with open('x'):\n        import httpx", "the package httpx is not in cluster.txt"),
        ("try:\n    import dagster\nfinally:\n    pass", "the package dagster is not"),
        ("try:\n    pass\nexcept ImportError:\n    import dagster", "the package dagster is not"),
    ],
)
def test_an_import_that_fails_there_is_named(text: str, reason: str, tmp_path: Path) -> None:
    (note,) = missing(tmp_path, text)
    assert note.startswith(f"{tmp_path}/prog.py, line ")
    assert "works here and not on the supercomputer" in note
    assert reason in note


@pytest.mark.parametrize(
    "text",
    [
        "import os, sys, tomllib",
        "import ray.tune, numpy as np",
        "from dagster_pipes import open_dagster_pipes",
        "import yaml",  # of PyYAML, which Ray brings
        "import no_such_module_anywhere",  # fails here, too
        "try:\n    import dagster\nexcept ImportError:\n    dagster = None",
        "try:\n    import dagster\nexcept (ValueError, ModuleNotFoundError):\n    dagster = None",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import dagster",
        "from contextlib import suppress\nwith suppress(ImportError):\n    import dagster",
        "import helper, package.sub\nfrom package import other",
        f"x = {'+'.join(['1'] * 1500)}",
        "if x:\n    pass\n" + "elif x:\n    pass\n" * 1500,
    ],
)
def test_any_other_import_is_not(text: str, tmp_path: Path) -> None:
    (tmp_path / "package" / "sub").mkdir(parents=True)
    for name in ("helper.py", "package/__init__.py", "package/other.py", "package/sub/__init__.py"):
        (tmp_path / name).write_text("")
    assert missing(tmp_path, text) == []


def test_a_program_that_is_a_link_imports_what_is_beside_its_target(tmp_path: Path) -> None:
    for folder in ("own", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "other" / "prog.py").write_text("import beside\n")
    (tmp_path / "same.py").write_text("")
    for link, target in (("own/prog.py", "../other/prog.py"), ("link.py", "same.py"), ("folder", "other")):
        (tmp_path / link).symlink_to(target)
    programs = {
        name: read_workload(tmp_path / name, [], tmp_path) for name in ("own/prog.py", "link.py", "folder/prog.py")
    }
    (note,) = find_missing(programs.pop("own/prog.py"), PROJECT, None)
    assert f"{tmp_path}/own/prog.py is a link to {tmp_path}/other/prog.py. Here, it imports modules beside that" in note
    assert [find_missing(each, PROJECT, None) for each in programs.values()] == [[], []]


def test_calls_in_threads_parse_programs_one_at_a_time(tmp_path: Path) -> None:
    """In Python 3.11, `ast.parse` collects garbage, whose finalizers let another thread run (SystemError)."""

    class Garbage(list[Any]):
        def __del__(self) -> None:
            time.sleep(0.0001)

    def look(_: int) -> list[str]:
        itself = Garbage()
        itself.append(itself)
        return find_missing(read_workload(program, [], tmp_path), PROJECT, None)

    program = tmp_path / "prog.py"
    program.write_text("if x:\n    pass\n" + "elif x:\n    pass\n" * 100)
    before = gc.get_threshold()
    gc.set_threshold(50)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(look, range(200))) == [[]] * 200
    finally:
        gc.set_threshold(*before)


@pytest.mark.parametrize("module", [".helper", ".", "....................................."])
def test_a_relative_import_of_a_program_is_named(module: str, tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("")
    (note,) = missing(tmp_path, f"import os\nfrom {module} import grid\nfrom {module} import sea")
    assert note.startswith(f"{tmp_path}/prog.py, line ")
    assert "a relative import fails in a program" in note
    assert missing(tmp_path, "try:\n    from . import helper\nexcept ImportError:\n    import helper") == []


@pytest.mark.parametrize("name", ["random.py", "queue/__init__.py", "dagster_pipes.py"])
@pytest.mark.parametrize("launcher", [ScriptLauncher(), CommandLauncher()])
def test_a_file_with_the_name_of_a_module_of_python_is_named(name: str, launcher: Launcher, tmp_path: Path) -> None:
    (tmp_path / "queue").mkdir()
    for each in ("prog", "mine.py", "time.py", "test.py", "queue/data.csv", "json.txt", name):  # `time` is built in
        (tmp_path / each).write_text("#!/bin/sh\n" if each == "prog" else "")
    program = tmp_path / "prog"
    program.chmod(0o700)
    if launcher.runs_python:
        program = program.rename(tmp_path / "prog.py")
        program.write_text("")
    (note,) = make_plan(Settings(), PROJECT, program, launcher, SlurmRequest()).notes
    path = tmp_path / name.removesuffix("/__init__.py")
    assert note.startswith(f"{path} hides the module `{path.stem}`: whatever imports that module gets this file")


def test_modules_of_the_code_root_are_followed(tmp_path: Path) -> None:
    (tmp_path / "package" / "sub").mkdir(parents=True)
    (tmp_path / "package" / "__init__.py").write_text("from .sub import deep")
    (tmp_path / "package" / "sub" / "deep.py").write_text("from .. import beside\n")
    (tmp_path / "package" / "beside.py").write_text("import package\nimport dagster\n")
    (note,) = missing(tmp_path, "import package")
    assert note.startswith(f"{tmp_path}/package/beside.py, line 2: `import dagster`")


def test_a_module_that_git_ignores_is_named(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text("_*.py\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "_version.py").touch()
    (tmp_path / "package" / "_unused.py").touch()
    (note,) = missing(tmp_path, "from package import _version")
    assert note.startswith(f"{tmp_path}/package/_version.py works here and not on the supercomputer: git ignores it")
    subprocess.run(["git", "-C", str(tmp_path), "add", "--force", "package"], check=True)
    assert missing(tmp_path, "from package import _version") == []


def test_a_file_that_git_ignores_is_named(tmp_path: Path) -> None:
    """In development the workload reads it."""
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text("*.csv\ntables/\n")
    (tmp_path / "tables").mkdir()
    for name in ("grüße.csv", "other.csv", "kept.txt"):
        (tmp_path / name).touch()
    reads = "from pathlib import Path\nhere = Path(__file__).parent\n"
    (note,) = missing(tmp_path, f"{reads}text = (here / 'grüße.csv').read_text()")
    assert note.startswith(
        f"{tmp_path}/prog.py names the file {tmp_path}/grüße.csv, which is not there on the supercomputer: git ignores"
    )
    assert len(missing(tmp_path, f"{reads}found = (here / 'tables' / 'a.txt').read_text()")) == 1
    others = ["'kept.txt'", "'absent.csv'", "'/other.csv'", "''", "'.'", "'..'", "'other.csv\\0'", f"'{'a' * 5000}'"]
    assert missing(tmp_path, "\n".join(others)) == []


def test_packages_of_slurm_python_are_not_known(tmp_path: Path) -> None:
    assert missing(tmp_path, "import dagster", own_packages=True) == []
    assert len(missing(tmp_path, "import resources", own_packages=True)) == 1


@pytest.mark.parametrize("path", sorted(WORKLOADS.glob("*.py")), ids=lambda path: path.name)
def test_the_workloads_of_this_project_are_complete(path: Path) -> None:
    assert find_missing(read_workload(path, [], WORKLOADS), PROJECT, PROJECT.lock) == []
