"""The project in a real `dagster dev`."""

import os
import re
import signal
from pathlib import Path

import httpx
import pytest

from support.dagster_dev import DagsterDev, gone, wait_for, workload_processes

pytestmark = pytest.mark.local


def test_nothing_is_complained_about_but_dagster_dev_itself(
    dagster_dev: DagsterDev, whole_example: str, log_of_example: list[str]
) -> None:
    text = "".join(log_of_example)
    complaints = [line for line in text.splitlines() if "Warning" in line or "Traceback" in line]
    assert complaints
    for line in complaints:
        assert "SupersessionWarning: Function `dev_command` is superseded" in line
    assert "telemetry" not in text.lower()
    outputs = [
        path.read_text() for path in (dagster_dev.folder / ".dagster" / "compute_logs" / whole_example).rglob("*.err")
    ]
    assert outputs
    for output in outputs:
        assert "STEP_SUCCESS" in output
        assert not re.search(r"(Beta|Preview|Deprecation|Supersession)Warning|Traceback", output)


def test_telemetry_and_the_welcome_dialog_are_off(dagster_dev: DagsterDev) -> None:
    assert dagster_dev.ask("{ shouldShowNux }") == {"shouldShowNux": False}
    assert '"telemetryEnabled": false' in httpx.get(dagster_dev.url).text


def test_every_month_of_a_run_over_all_has_its_own_numbers(dagster_dev: DagsterDev, whole_example: str) -> None:
    for asset in ("flights", "delay_features"):
        events = [event for event in dagster_dev.materializations(asset) if event["runId"] == whole_example]
        assert sorted(event["partition"] for event in events) == [f"2013-{month:02}" for month in range(1, 13)]
        rows = {event["partition"]: event["rows"] for event in events}
        assert len(set(rows.values())) == 12
        if asset == "flights":
            assert (rows["2013-01"], rows["2013-02"], rows["2013-12"]) == (27004, 24951, 28135)
            assert sum(rows.values()) == 336_776


def test_two_months_at_once(dagster_dev: DagsterDev) -> None:
    runs = {month: dagster_dev.launch("flights", dagster__partition=month) for month in ("2013-03", "2013-04")}
    for month, rows in {"2013-03": 28834, "2013-04": 28330}.items():
        assert dagster_dev.wait(runs[month]) == "SUCCESS"
        newest = dagster_dev.materializations("flights", month)[0]
        assert (newest["runId"], newest["rows"]) == (runs[month], rows)


def test_output_is_in_the_compute_logs_once(dagster_dev: DagsterDev) -> None:
    run_id = dagster_dev.launch("talker", location="probe")
    assert dagster_dev.wait(run_id) == "SUCCESS"
    folder = dagster_dev.folder / ".dagster" / "compute_logs" / run_id
    (out,) = folder.rglob("*.out")
    (err,) = folder.rglob("*.err")
    assert out.read_text().splitlines() == [f"line {number}" for number in range(1000)]
    assert err.read_text().count("a word to stderr") == 1


def start_sleeper(dagster_dev: DagsterDev, asset: str) -> tuple[str, list[int], int]:
    """A run that has begun to sleep: its id, the pids of all that its workload started, and the run worker's."""
    run_id = dagster_dev.launch(asset, location="probe", dagster__max_retries="0")
    path = dagster_dev.data_root / f"pids-{run_id}"
    wait_for(path.exists, 90, "the workload runs")
    workload, child, supervisor = map(int, path.read_text().split())
    pids = workload_processes(dagster_dev.data_root)
    assert {workload, child, supervisor} <= set(pids)
    worker = Path(f"/proc/{supervisor}/stat").read_text().rsplit(")", 1)[1].split()[1]
    return run_id, pids, int(worker)


@pytest.mark.parametrize("asset", ["sleeper", "ray_sleeper"])
def test_terminate_ends_the_workload_with_its_children(asset: str, dagster_dev: DagsterDev) -> None:
    run_id, pids, _ = start_sleeper(dagster_dev, asset)
    dagster_dev.terminate(run_id)
    assert dagster_dev.wait(run_id, 60) == "CANCELED"
    wait_for(lambda: all(gone(pid) for pid in pids), 20, "every process of the workload has ended")


def test_runs_at_once_share_no_process(dagster_dev: DagsterDev) -> None:
    first_run, first, _ = start_sleeper(dagster_dev, "sleeper")
    second_run, both, _ = start_sleeper(dagster_dev, "sleeper")
    second = set(both) - set(first)
    assert len(second) == len(first) == 3  # supervisor, workload, its child
    dagster_dev.terminate(first_run)
    assert dagster_dev.wait(first_run, 60) == "CANCELED"
    wait_for(lambda: all(gone(pid) for pid in first), 20, "every process of the first run has ended")
    assert dagster_dev.status(second_run) == "STARTED"
    assert not any(gone(pid) for pid in second)
    dagster_dev.terminate(second_run)
    assert dagster_dev.wait(second_run, 60) == "CANCELED"


def test_a_killed_run_leaves_no_run_directory(dagster_dev: DagsterDev) -> None:
    run_id, _, worker = start_sleeper(dagster_dev, "sleeper")
    directory = Path((dagster_dev.data_root / f"run-directory-{run_id}").read_text())
    assert (directory / "context.json").exists()
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: not directory.exists(), 20, "the run directory is removed")


@pytest.mark.parametrize("asset", ["sleeper", "ray_sleeper"])
def test_a_killed_run_takes_its_workload_with_it(asset: str, dagster_dev: DagsterDev) -> None:
    run_id, pids, worker = start_sleeper(dagster_dev, asset)
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: all(gone(pid) for pid in pids), 20, "every process of the workload has ended")
    assert dagster_dev.wait(run_id, 120) == "FAILURE"


def test_history_survives_a_restart(dagster_dev: DagsterDev) -> None:
    run_id = dagster_dev.launch("talker", location="probe")
    assert dagster_dev.wait(run_id) == "SUCCESS"
    before = dagster_dev.materializations("talker")
    dagster_dev.stop()
    dagster_dev.start()
    assert dagster_dev.status(run_id) == "SUCCESS"
    assert dagster_dev.materializations("talker") == before
    kept = {path.name for path in dagster_dev.folder.iterdir() if not path.name.startswith(".tmp_dagster_home_")}
    assert kept == {".dagster", "dagster.yaml", "workspace.yaml"}
