"""The commands for people: how the tests are run, what copies import of the engine, the pixi tasks that call them."""

import ast
import contextlib
import importlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from support import ROOT

SCRIPTS = sorted(path for path in (ROOT / "scripts").iterdir() if not path.name.startswith("_") and path.is_file())
TASKS = tomllib.loads((ROOT / "pixi.toml").read_text())["tasks"]


def run(command: list[str], **options: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["-n", "WORKERS", "--dist", "loadfile"]),
        (["unit", "-x"], ["-m", "not cluster and not local", "-x", "-n", "WORKERS", "--dist", "loadfile"]),
        (["smoke", "-n", "1"], ["-m", "smoke", "-n", "1"]),
        (["tests/unit/test_scripts.py::test_it"], ["tests/unit/test_scripts.py::test_it"]),
        (["-k", "unit", "--pdb"], ["-k", "unit", "--pdb"]),
    ],
)
def test_the_tests_run_in_parallel_unless_the_options_say_otherwise(
    words: list[str], expected: list[str], tmp_path: Path
) -> None:
    (tmp_path / "pytest").mkdir()
    (tmp_path / "pytest" / "__init__.py").touch()
    (tmp_path / "pytest" / "__main__.py").write_text("import json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    command = [sys.executable, str(ROOT / "scripts" / "test"), *words]
    done = run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    workers = str(min(2 * (os.cpu_count() or 1), 8))
    assert json.loads(done.stdout) == [workers if word == "WORKERS" else word for word in expected]


def test_what_is_no_test_is_named() -> None:
    """pytest's workers say nothing about it."""
    done = run([sys.executable, str(ROOT / "scripts" / "test"), "unti", "-x"])
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == "scripts/test: 'unti' is neither unit nor smoke, nor a file or folder of tests\n"


OF_COPIES = {
    "dagster_sbatch.commands": "costs demo deploy_environment dev docs doctor job lock preview "
    "refresh_step_auth upgrade",
    "dagster_sbatch.commands.signals": "interrupt_once",
    "slurm_in_a_box.command_line": "main",
}
"""What scripts and tests import beside the public API."""


def test_what_copies_import_of_the_engine_stays() -> None:
    """A copy keeps its scripts and tests after an upgrade: they need each name that a template has ever imported."""
    skeleton = ROOT / "scripts" / "_skeleton"
    files = [*SCRIPTS, *(path for path in skeleton.rglob("*") if path.is_file() and path.parent.name != "__pycache__")]
    imported: dict[str, set[str]] = {}
    for path in (path for path in files if path.suffix in ("", ".py") and path != ROOT / "scripts" / "new_project"):
        with contextlib.suppress(SyntaxError):  # no Python
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[2]:
                    imported.setdefault(node.module, set()).update(each.name for each in node.names)
    engine = {
        name: names for name, names in imported.items() if name.startswith(("dagster_sbatch.", "slurm_in_a_box."))
    }
    assert engine == {name: set(names.split()) for name, names in OF_COPIES.items()}
    for module, names in OF_COPIES.items():
        for name in names.split():
            assert hasattr(importlib.import_module(module), name) or importlib.import_module(f"{module}.{name}")


@pytest.mark.parametrize("name", TASKS)
def test_a_pixi_task_is_a_command_that_exists(name: str) -> None:
    program, script = TASKS[name]["cmd"].split()
    assert program == "python"
    assert ROOT / script in SCRIPTS


def test_pixi_asks_for_the_python_that_the_project_supports() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert tomllib.loads((ROOT / "pixi.toml").read_text())["dependencies"]["python"] == project["requires-python"]
