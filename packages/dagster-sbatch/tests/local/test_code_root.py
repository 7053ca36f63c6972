"""A workload finds its modules here as it does on the supercomputer: same code root, same `sys.path`."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resources import PROJECT
from support import workload_asset
from support.code_root import check_metadata, make_package, make_program
from support.workload_asset import materialize

pytestmark = pytest.mark.local


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "workloads"
    folder.mkdir()
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "data"))
    monkeypatch.setattr(workload_asset, "PROJECT", replace(PROJECT, workload_folder=str(folder)))
    return folder


@pytest.mark.parametrize("make", [make_program, make_package])
def test_a_program_in_a_subfolder_and_a_package(
    make: Callable[[Path], tuple[Path, dict[str, Any]]], root: Path
) -> None:
    path, arguments = make(root)
    outcome = materialize(path, root, **arguments)
    assert outcome.error == ""
    check_metadata(outcome.materializations[None][0])


def test_the_working_directory_is_the_run_directory(root: Path) -> None:
    text = "import os, pathlib\nfrom dagster_pipes import open_dagster_pipes\nwith open_dagster_pipes() as pipes:\n"
    text += "    assert (pathlib.Path.cwd().parent / 'context.json').exists(), os.listdir()\n"
    assert materialize(text, root).error == ""


def test_imports_that_cannot_work_on_the_supercomputer_are_warned_about(
    root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = "import resources, dagster\nfrom dagster_pipes import open_dagster_pipes\nwith open_dagster_pipes(): pass\n"
    assert materialize(text, root).success
    said = capfd.readouterr().err
    assert "line 1: `import resources` works here and not on the supercomputer" in said
    assert "line 1: `import dagster` works here and not on the supercomputer" in said
