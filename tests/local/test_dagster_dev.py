"""The project in a real `dagster dev`."""

import os
import signal
from pathlib import Path

import pytest

from tests.local.dagster_dev import DagsterDev, gone, wait_for

pytestmark = pytest.mark.local


def test_nothing_is_complained_about_but_dagster_dev_itself(dagster_dev: DagsterDev) -> None:
    text = dagster_dev.log.read_text()
    notice = "SupersessionWarning: Function `dev_command` is superseded"
    assert text.count("Warning: ") == text.count(notice) == 1
    assert "Traceback" not in text
    assert "telemetry" not in text.lower()


def test_every_month_of_a_run_over_all_has_its_own_numbers(dagster_dev: DagsterDev, whole_example: str) -> None:
    for month, rows in {"2013-01": 27004, "2013-02": 24951, "2013-12": 28135}.items():
        events = [event for event in dagster_dev.materializations("flights", month) if event["runId"] == whole_example]
        assert [event["rows"] for event in events] == [rows]
    of_run = [event for event in dagster_dev.materializations("flights") if event["runId"] == whole_example]
    assert len(of_run) == 12


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


def start_sleeper(dagster_dev: DagsterDev) -> tuple[str, list[int]]:
    """A run that has begun to sleep: its id, and the pids of workload, its child and the supervisor."""
    run_id = dagster_dev.launch("sleeper", location="probe", dagster__max_retries="0")
    path = dagster_dev.folder.parent / "data" / f"pids-{run_id}"
    wait_for(path.exists, 90, "the workload runs")
    return run_id, [int(pid) for pid in path.read_text().split()]


def test_terminate_ends_the_workload_with_its_children(dagster_dev: DagsterDev) -> None:
    run_id, pids = start_sleeper(dagster_dev)
    assert not any(gone(pid) for pid in pids)
    dagster_dev.terminate(run_id)
    assert dagster_dev.wait(run_id, 60) == "CANCELED"
    wait_for(lambda: all(gone(pid) for pid in pids), 20, "every process of the workload has ended")


def test_a_killed_run_takes_its_workload_with_it(dagster_dev: DagsterDev) -> None:
    run_id, pids = start_sleeper(dagster_dev)
    worker = int(Path(f"/proc/{pids[2]}/stat").read_text().rsplit(")", 1)[1].split()[1])
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: all(gone(pid) for pid in pids), 20, "every process of the workload has ended")
    assert dagster_dev.wait(run_id, 120) == "FAILURE"


def test_history_survives_a_restart(dagster_dev: DagsterDev, whole_example: str) -> None:
    before = dagster_dev.materializations("flights", "2013-02")
    dagster_dev.stop()
    dagster_dev.start()
    assert dagster_dev.status(whole_example) == "SUCCESS"
    assert dagster_dev.materializations("flights", "2013-02") == before
    kept = {path.name for path in dagster_dev.folder.iterdir() if not path.name.startswith(".tmp_dagster_home_")}
    assert kept == {".dagster", "dagster.yaml", "workspace.yaml"}
