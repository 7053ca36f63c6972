"""Assets in a real `dagster dev` as the project configures it, and a job array in its UI.

With UPDATE_SCREENSHOTS=1 the picture of docs/many-partitions.md is taken anew.
"""

import os
import signal
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect

from support.browser import expect_partitions, open_failure, open_ui, take
from support.dagster_dev import DagsterDev, gone, wait_for, workload_processes
from support.local_fixtures import DAYS

pytestmark = pytest.mark.local
DAY = "2021-03-17"
"""One of those whose observations are missing at first."""


def test_telemetry_and_the_welcome_dialog_are_off(dagster_dev: DagsterDev) -> None:
    assert dagster_dev.ask("{ shouldShowNux }") == {"shouldShowNux": False}
    assert '"telemetryEnabled": false' in httpx.get(dagster_dev.url).text


def test_output_is_in_the_compute_logs_once(dagster_dev: DagsterDev) -> None:
    assets = ("talker", "command_talker", "batch_script_talker")
    runs = {asset: dagster_dev.launch(asset, location="probe") for asset in assets}
    for asset, run_id in runs.items():
        assert dagster_dev.wait(run_id) == "SUCCESS"
        folder = dagster_dev.folder / ".dagster" / "compute_logs" / run_id
        (out,) = folder.rglob("*.out")
        (err,) = folder.rglob("*.err")
        assert out.read_text().splitlines() == [f"line {number}" for number in range(1000)]
        assert err.read_text().count("a word to stderr") == 1
        newest = dagster_dev.materializations(asset)[0]
        assert (newest["runId"], newest.get("lines")) == (run_id, None if asset == "talker" else 1000)


def start_sleeper(dagster_dev: DagsterDev, asset: str) -> tuple[str, list[int], int]:
    """A run that has begun to sleep: its id, the pids of all that its workload started, and the run worker's."""
    run_id = dagster_dev.launch(asset, location="probe", dagster__max_retries="0")
    path = dagster_dev.data_root / f"pids-{run_id}"
    text = wait_for(lambda: path.exists() and path.read_text(), 90, "the workload runs")
    if asset == "srun_sleeper":
        wait_for(path.with_name(f"{path.name}-").exists, 90, "rank 1 runs")
    workload, child, supervisor = map(int, text.split())
    pids = workload_processes(dagster_dev.data_root)
    assert {workload, child, supervisor} <= set(pids)
    worker = Path(f"/proc/{supervisor}/stat").read_text().rsplit(")", 1)[1].split()[1]
    return run_id, pids, int(worker)


@pytest.mark.parametrize("asset", ["sleeper", "srun_sleeper", "ray_sleeper"])
def test_terminate_ends_the_workload_with_its_children(asset: str, dagster_dev: DagsterDev) -> None:
    run_id, pids, _ = start_sleeper(dagster_dev, asset)
    dagster_dev.terminate(run_id)
    assert dagster_dev.wait(run_id, 60) == "CANCELED"
    wait_for(lambda: all(gone(pid) for pid in pids), 60, "every process of the workload has ended")


def test_runs_at_once_share_no_process(dagster_dev: DagsterDev) -> None:
    first_run, first, _ = start_sleeper(dagster_dev, "command_sleeper")
    second_run, both, _ = start_sleeper(dagster_dev, "batch_script_sleeper")
    second = set(both) - set(first)
    assert len(second) == len(first) == 3  # supervisor, workload, its child
    dagster_dev.terminate(first_run)
    assert dagster_dev.wait(first_run, 60) == "CANCELED"
    wait_for(lambda: all(gone(pid) for pid in first), 60, "every process of the first run has ended")
    assert dagster_dev.status(second_run) == "STARTED"
    assert not any(gone(pid) for pid in second)
    dagster_dev.terminate(second_run)
    assert dagster_dev.wait(second_run, 60) == "CANCELED"
    wait_for(lambda: all(gone(pid) for pid in second), 20, "every process of the second run has ended")


def test_a_killed_run_leaves_no_run_directory(dagster_dev: DagsterDev) -> None:
    run_id, _, worker = start_sleeper(dagster_dev, "sleeper")
    directory = Path((dagster_dev.data_root / f"run-directory-{run_id}").read_text())
    assert (directory / "context.json").exists()
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: not directory.exists(), 60, "the run directory is removed")


@pytest.mark.parametrize("asset", ["sleeper", "srun_sleeper", "ray_sleeper"])
def test_a_killed_run_takes_its_workload_with_it(asset: str, dagster_dev: DagsterDev) -> None:
    run_id, pids, worker = start_sleeper(dagster_dev, asset)
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: all(gone(pid) for pid in pids), 60, "every process of the workload has ended")
    assert dagster_dev.wait(run_id, 120) == "FAILURE"


def tasks_of(server: DagsterDev, run_id: str) -> list[str]:
    """The first day of each task that a run has started."""
    return sorted(path.name.removeprefix(f"weather-{run_id}-") for path in server.data_root.glob(f"weather-{run_id}-*"))


def test_a_backfill_of_many_partitions_with_failures_and_its_re_execution(
    dagster_dev: DagsterDev, tmp_path: Path
) -> None:
    """Of 200, with STRESS=1 of 1,000, in tasks of ten days each; four tasks fail at first."""
    days, tasks = len(DAYS), len(DAYS) // 10
    with open_ui(dagster_dev.url) as page:
        page.goto("about:blank")  # an open page of the UI asks for news all the time
        first = dagster_dev.backfill("weather", DAYS)
        wait_for(lambda: len(tasks_of(dagster_dev, first)) == tasks, 180, "all tasks have begun; the last one waits")
        expect_partitions(page, "weather", DAY, failed=0, materialized=days - 50, materializing=50)
        page.goto("about:blank")
        (dagster_dev.data_root / "weather-seen").touch()
        assert dagster_dev.wait(first) == "FAILURE"

        expect_partitions(page, "weather", DAY, failed=40, materialized=days - 40, materializing=0, missing=0)
        expect(page.get_by_text("failed, and did not materialize this asset.")).to_be_visible()
        take(page, "many-partitions.png", tmp_path)
        failure = open_failure(page, first)
        head = f"4 of {tasks} tasks failed. The other tasks have materialized {days - 40}"
        expect(failure.get_by_text(head)).to_be_visible()
        for cause in ("FileNotFoundError: no observations of 2021-05-28", "ValueError: temperature of 451.0 degrees"):
            expect(failure.get_by_role("cell", name=f"weather.py raised {cause}", exact=True)).to_be_visible()

        page.goto("about:blank")
        (dagster_dev.data_root / "weather-fixed").touch()
        second = dagster_dev.re_execute_from_failure(first)
        assert dagster_dev.wait(second) == "SUCCESS"
        assert tasks_of(dagster_dev, second) == ["2021-02-10", "2021-03-12", "2021-05-21", "2021-05-31"]
        expect_partitions(page, "weather", DAY, failed=0, materialized=days)
        expect(page.get_by_text("mean_temperature", exact=True)).to_be_visible()
