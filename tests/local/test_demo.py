"""`scripts/demo` in a copy: it shows what the assets reported, and why one failed; Ctrl-C leaves nothing running."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from slurm_in_a_box import wait_until
from support.dagster_dev import gone
from support.new_project import PACKAGE, made_in, plain_environment, run_in

pytestmark = pytest.mark.local


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_in(tmp_path_factory.mktemp("copy"))


@pytest.fixture
def workload(copy: Path) -> Path:
    """The program of the copy's asset; it is a fresh one for each test."""
    path = copy / PACKAGE / "workloads" / "pi_estimate.py"
    run_in(copy, "git", "restore", str(path))
    return path


@pytest.mark.usefixtures("workload")
def test_it_shows_what_the_assets_reported(copy: Path, no_namespaces: str) -> None:
    done = run_in(copy, sys.executable, "scripts/demo", PATH=no_namespaces, SLURM_ACCOUNT="another", COLUMNS="200")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "│ pi_estimate │ " in done.stdout
    assert "pi 3.13504, points 200000" in done.stdout
    assert "There is no simulated supercomputer here: " in done.stdout
    assert (copy / ".dagster" / "demo.log").read_text().count("RUN_SUCCESS") == 1
    assert run_in(copy, "git", "status", "--porcelain").stdout == ""


def test_it_shows_why_an_asset_failed(copy: Path, workload: Path) -> None:
    """The simulated site is not even started."""
    workload.write_text("raise ValueError('the circle is square')\n")
    done = run_in(copy, sys.executable, "scripts/demo", COLUMNS="200")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the circle is square" in done.stdout
    assert f"The whole log is {copy}/.dagster/demo.log" in done.stdout
    assert "supercomputer" not in done.stdout


def test_an_interrupt_leaves_nothing_running(copy: Path, workload: Path) -> None:
    """`kill` and the end of the terminal have the same handler, also in a step: unit/test_interrupts.py has these."""
    asleep = copy / ".dagster" / "asleep"
    workload.write_text(f"import pathlib, time\npathlib.Path({str(asleep)!r}).touch()\ntime.sleep(600)\n")
    process = subprocess.Popen(
        [sys.executable, "scripts/demo"],
        cwd=copy,
        env=plain_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(asleep.exists, "the workload runs")
        below = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGINT)
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Interrupted; nothing is left running." in output
    assert len(below) >= 3  # Dagster, the supervisor, the workload
    assert [each for each in below if each.is_running() and not gone(each.pid)] == []
