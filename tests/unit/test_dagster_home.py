"""DAGSTER_HOME in the user's shell does not switch the project's dagster.yaml off unseen."""

import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import dagster as dg
import pytest

from dagster_sbatch.inspect.diagnosis.finding import Facts, Finding
from dagster_sbatch.inspect.diagnosis.this_machine import check_dagster_home
from resources import PROJECT
from support import ROOT


@pytest.mark.usefixtures("no_other_daemon")
def test_dev_uses_the_projects_own(tmp_path: Path) -> None:
    (tmp_path / "dagster").mkdir()
    (tmp_path / "dagster" / "__init__.py").touch()
    (tmp_path / "dagster" / "__main__.py").write_text("import os; print(os.environ['DAGSTER_HOME'], os.getcwd())\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "DAGSTER_HOME": str(tmp_path)}
    command = [sys.executable, str(ROOT / "scripts" / "dev")]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout == f"{ROOT} {ROOT}\n"
    assert f"DAGSTER_HOME={tmp_path} is not used: dagster.yaml and the history are in {ROOT}" in done.stderr


def checked(home: Path, monkeypatch: pytest.MonkeyPatch) -> Finding:
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    with ExitStack() as stack:
        return check_dagster_home(Facts(PROJECT, dg.DagsterInstance.get, stack))


def test_the_doctor_warns_about_another_dagster_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where a relative history goes
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    state, found, fix = checked(tmp_path, monkeypatch)
    assert (state, found) == (
        "warning",
        f"DAGSTER_HOME={tmp_path} has a dagster.yaml without run_retries and run_monitoring and ForkingRunLauncher",
    )
    assert str(ROOT / "dagster.yaml") in fix
    shutil.copy(ROOT / "dagster.yaml", tmp_path)
    assert checked(tmp_path, monkeypatch) == ("ok", str(tmp_path), "")


def test_the_doctor_names_a_home_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, found, _ = checked(tmp_path / "nowhere", monkeypatch)
    assert state == "broken"
    assert f"DAGSTER_HOME={tmp_path / 'nowhere'} cannot be used" in found
