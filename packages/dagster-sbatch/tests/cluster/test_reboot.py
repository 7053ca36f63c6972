"""Dagster and all that it started is killed at once, as in a power cut, while a job runs on the supercomputer."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import dagster as dg
import psutil
import pytest

from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite
from support.dagster_dev import DagsterDev, beside_location, wait_for

pytestmark = pytest.mark.cluster

LOCATION = """\
import os
from pathlib import Path
import dagster as dg
from resources import PROJECT, build_resources
from dagster_sbatch import make_upkeep
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.launchers import BatchScriptLauncher, ScriptLauncher
from dagster_sbatch.slurm import SlurmRequest

def define(name, launcher, program):
    @dg.asset(name=name)
    def waiter(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        workload, request = Path(os.environ["WAITERS"], program), SlurmRequest(time_limit="8")
        done = compute.run(context, workload=workload, launcher=launcher, request=request)
        return done.get_materialize_result()
    return waiter

dies = define("dies", BatchScriptLauncher(), "waiter.sbatch")
lives = define("lives", ScriptLauncher(), "waiter.py")
unlucky = define("unlucky", BatchScriptLauncher(), "waiter.sbatch")
(sensor,) = [each for each in make_upkeep(PROJECT).sensors if each.name == "cancel_orphaned_jobs"]
defs = dg.Definitions(
    assets=[dies, lives, unlucky], sensors=[sensor], resources=build_resources(), executor=dg.in_process_executor
)
"""
WAITER = """\
import os, pathlib, time
from dagster_pipes import open_dagster_pipes
with open_dagster_pipes() as pipes:
    print("waiting")
    while not (pathlib.Path(os.environ["DATA_ROOT"]) / "go").exists():
        time.sleep(0.1)
    pipes.report_asset_materialization()
"""
BATCH_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=waiter --ntasks=1
echo waiting
until [ -e "$DATA_ROOT/go" ]; do sleep 0.1; done
pipes materialize --metadata rows=7
"""


def write_programs(folder: Path) -> Path:
    """Write what the assets of LOCATION run into a new folder, which its variable WAITERS names; return the folder."""
    folder.mkdir()
    (folder / "waiter.py").write_text(WAITER)
    (folder / "waiter.sbatch").write_text(BATCH_SCRIPT)
    return folder


@pytest.fixture
def dagster_dev(site: SimulatedSite, tmp_path: Path, client_home: Path) -> Iterator[DagsterDev]:
    programs = write_programs(tmp_path / "waiting")
    (tmp_path / "location.py").write_text(LOCATION)
    variables = {**site.environment(), "HOME": str(client_home), "WAITERS": str(programs)}
    variables["DATA_ROOT"] = f"{CERTIFICATE_USER.home}/data"
    with beside_location(tmp_path / "location.py", tmp_path / "project", variables, "waiting") as server:
        yield server


def worker_of(server: DagsterDev, run_id: str) -> psutil.Process:
    """The process of a run."""
    os.chdir(server.folder)  # its history lies relative to it
    with dg.DagsterInstance.from_config(str(server.folder)) as instance:
        (entry,) = instance.all_logs(run_id, of_type=dg.DagsterEventType.RUN_START)
        return psutil.Process(entry.get_dagster_event().pid)


def fail_slowly(server: DagsterDev, run_id: str) -> None:
    """Report the failure of a run as Dagster does, but so slowly that its daemon examines the run in the middle."""
    name = "EVENT_LOG_CONSUMER_CURSOR-PIPELINE_FAILURE"
    event = dg.DagsterEvent(event_type_value=dg.DagsterEventType.RUN_FAILURE.value, job_name="", message="killed")
    entry = dg.EventLogEntry(  # type: ignore[no-untyped-call]
        error_info=None, user_message="", level="error", run_id=run_id, timestamp=time.time() - 600, job_name="",
        dagster_event=event,
    )  # fmt: skip
    with dg.DagsterInstance.from_config(str(server.folder)) as instance:
        before = instance.daemon_cursor_storage.get_cursor_values({name})
        instance.event_log_storage.store_event(entry)
        wait_for(
            lambda: instance.daemon_cursor_storage.get_cursor_values({name}) != before, 60, "the daemon has seen it"
        )
        with patch.object(instance.event_log_storage, "store_event"):
            instance.handle_new_event(entry)


def test_retries_adopt_their_jobs_and_a_run_that_lives_is_left_alone(
    dagster_dev: DagsterDev, site: SimulatedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a retry that Dagster has missed."""
    monkeypatch.chdir(dagster_dev.folder)
    of_others = set(site.squeue("--noheader", "--states=all", "--format=%i").split())
    runs = {asset: dagster_dev.launch(asset, location="waiting") for asset in ("dies", "lives", "unlucky")}

    def jobs() -> list[str]:
        rows = site.squeue("--noheader", "--states=all", "--format=%i %T %k").splitlines()
        return [row for row in rows if row.split()[0] not in of_others]

    wait_for(lambda: len([each for each in jobs() if "RUNNING" in each]) == 3, 120, "all jobs run")
    worker_of(dagster_dev, runs["unlucky"]).suspend()  # else it may see its end, and report a failure of the step
    fail_slowly(dagster_dev, runs["unlucky"])
    assert dagster_dev.status(runs["unlucky"]) == "FAILURE"
    dagster_dev.kill(spared=worker_of(dagster_dev, runs["lives"]))
    assert (len(jobs()), dagster_dev.log.exists()) == (3, True)
    dagster_dev.start()
    wait_for(lambda: dagster_dev.status(runs["dies"]) == "FAILURE", 90, "the run whose process is gone is ended")
    retries = {
        asset: wait_for(lambda: dagster_dev.re_execution_of(runs[asset]), 240, f"{asset} is retried")  # noqa: B023
        for asset in ("dies", "unlucky")
    }
    for retry in retries.values():
        wait_for(lambda: dagster_dev.status(retry) == "STARTED", 60, "the retry has begun")  # noqa: B023
    assert dagster_dev.status(runs["lives"]) == "STARTED"
    site.run_on_login(CERTIFICATE_USER, "mkdir -p data && touch data/go")
    for asset, run in ({"lives": runs["lives"]} | retries).items():
        assert dagster_dev.wait(run) == "SUCCESS", asset
        assert [event["runId"] for event in dagster_dev.materializations(asset)] == [run]
        assert len([each for each in jobs() if f"run={runs[asset]}" in each]) == 1
    assert dagster_dev.materializations("dies")[0]["rows"] == 7
    assert len(jobs()) == 3
