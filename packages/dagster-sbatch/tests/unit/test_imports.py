"""What is loaded when: checked in fresh interpreters."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import dagster_sbatch
from support import ROOT


def loaded(statement: str, names: tuple[str, ...]) -> list[str]:
    """Which of the packages are loaded after the statement, which prints no warning."""
    code = f"{statement}; import sys; print(*[name for name in {names!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_the_code_location_loads_without_a_warning_and_leaves_heavy_packages_out() -> None:
    heavy = ("ray", "pandas", "xgboost", "pyarrow", "matplotlib", "fabric", "paramiko", "httpx")
    assert loaded("import musica_pipelines.definitions", heavy) == []


@pytest.mark.parametrize("module", ["settings", "auth", "ssh", "slurm", "launchers", "run.plan", "run.local"])
def test_the_lower_rooms_know_no_dagster(module: str) -> None:
    assert loaded(f"import dagster_sbatch.{module}", ("dagster",)) == []


def test_workloads_know_neither_dagster_nor_the_repository() -> None:
    path = ROOT / "musica_pipelines" / "workloads"
    programs = ", ".join(program.stem for program in path.glob("*.py"))
    code = f"import sys; sys.path.insert(0, {str(path)!r}); import {programs}"
    assert loaded(code, ("dagster", "dagster_sbatch", "resources", "jobs", "musica_pipelines")) == []


def test_no_two_modules_of_the_engine_have_the_same_name() -> None:
    names = [path.name for path in Path(dagster_sbatch.__file__).parent.rglob("*.py") if path.name != "__init__.py"]
    assert [name for name, number in Counter(names).items() if number > 1] == []
