"""Some of the example's months as an array, from the UI: one fails, and after the correction one task runs."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from musica_pipelines.assets.flight_delays import months
from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite, wait_until
from support import ROOT
from support.browser import expect_partitions, open_failure, open_ui
from support.dagster_dev import DagsterDev

from flight_delays import source, storage

pytestmark = pytest.mark.cluster
MONTHS = list(months.get_partition_keys())[4:8]
BROKEN = "2013-07"
ROWS = 500


@pytest.fixture
def data(site: SimulatedSite, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data root, as this machine sees it, with a few flights of each month but one."""
    folder = site.layout.home / CERTIFICATE_USER.name / "data"
    monkeypatch.setenv("DATA_ROOT", str(folder))
    for month, table in source.read_flights(MONTHS).items():
        storage.write_table(storage.flights_file(month), table.head(ROWS))
    monkeypatch.delenv("DATA_ROOT")
    for path in (folder, *folder.rglob("*")):
        os.chown(path, CERTIFICATE_USER.uid, CERTIFICATE_USER.uid)
    (folder / "flights" / f"{BROKEN}.parquet").rename(folder / "kept.parquet")
    return folder


@pytest.fixture
def dagster_dev(on_supercomputer: dict[str, str], data: Path, tmp_path: Path) -> Iterator[DagsterDev]:
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("dagster.yaml", "workspace.yaml"):
        shutil.copy(ROOT / name, folder)
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    server = DagsterDev(folder, {**kept, **on_supercomputer, "DATA_ROOT": f"{CERTIFICATE_USER.home}/data"})
    try:
        server.start()
        yield server
    finally:
        server.stop()


def task_states(site: SimulatedSite) -> dict[str, str]:
    """Of all tasks of `delay_features` that were ever submitted, by id: `79_6`."""
    rows = site.sacct("-XnP", "--starttime=now-1days", "--format=JobID,State,JobName").splitlines()
    found = [row.split("|") for row in rows]
    return {task: state for task, state, name in found if name.startswith("delay_features-")}


def ended_tasks(site: SimulatedSite, known: dict[str, str], number: int) -> dict[str, str]:
    """So many tasks that were not known, once the accounting, which lags behind, has their ends."""
    found: dict[str, str] = {}

    def all_ended() -> bool:
        found.clear()
        found.update({task: state for task, state in task_states(site).items() if task not in known})
        return len(found) >= number and not {"PENDING", "RUNNING"} & set(found.values())

    wait_until(all_ended, "the accounting has the ends of all tasks")
    assert len(found) == number
    return found


def test_one_month_fails_and_after_the_correction_one_task_runs(
    dagster_dev: DagsterDev, site: SimulatedSite, data: Path
) -> None:
    before = task_states(site)
    with open_ui(dagster_dev.url) as page:
        page.goto("about:blank")  # an open page of the UI asks for news all the time
        first = dagster_dev.backfill("delay_features", MONTHS)
        assert dagster_dev.wait(first, 300) == "FAILURE"
        expect_partitions(page, "delay_features", BROKEN, failed=1, materialized=3)
        expect(page.get_by_text("failed, and did not materialize this asset.")).to_be_visible()
        failure = open_failure(page, first)
        expect(failure.get_by_text("1 of 4 tasks failed. The other tasks have materialized 3")).to_be_visible()
        expect(failure.get_by_text(f"materialise the partition {BROKEN} of flights first").first).to_be_visible()
        tasks = ended_tasks(site, before, 4)
        assert sorted(tasks.values()) == ["COMPLETED"] * 3 + ["FAILED"]
        assert len({task.partition("_")[0] for task in tasks}) == 1

        (data / "kept.parquet").rename(data / "flights" / f"{BROKEN}.parquet")
        page.goto("about:blank")
        second = dagster_dev.re_execute_from_failure(first)
        assert dagster_dev.wait(second, 300) == "SUCCESS"
        assert list(ended_tasks(site, {**before, **tasks}, 1).values()) == ["COMPLETED"]
        expect_partitions(page, "delay_features", BROKEN, failed=0, materialized=4)
        expect(page.get_by_text("late_share", exact=True)).to_be_visible()
    events = dagster_dev.materializations("delay_features")
    assert sorted(event["partition"] for event in events if event["runId"] == second) == MONTHS
