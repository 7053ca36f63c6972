"""Dagster and all that it started is killed at once, as in a power cut, while a job runs on the supercomputer."""

import os
from collections.abc import Iterator
from pathlib import Path

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
from resources import build_resources
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
defs = dg.Definitions(assets=[dies, lives], resources=build_resources(), executor=dg.in_process_executor)
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


def test_a_retry_adopts_the_job_and_a_run_that_lives_is_left_alone(
    dagster_dev: DagsterDev, site: SimulatedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(dagster_dev.folder)
    of_others = set(site.squeue("--noheader", "--states=all", "--format=%i").split())
    dies, lives = (dagster_dev.launch(asset, location="waiting") for asset in ("dies", "lives"))

    def jobs() -> list[str]:
        rows = site.squeue("--noheader", "--states=all", "--format=%i %T %k").splitlines()
        return [row for row in rows if row.split()[0] not in of_others]

    wait_for(lambda: len([each for each in jobs() if "RUNNING" in each]) == 2, 120, "both jobs run")
    dagster_dev.kill(spared=worker_of(dagster_dev, lives))
    assert (len(jobs()), dagster_dev.log.exists()) == (2, True)
    dagster_dev.start()
    wait_for(lambda: dagster_dev.status(dies) == "FAILURE", 90, "the run whose process is gone is ended")
    retry = wait_for(lambda: dagster_dev.newest_run_but(dies, lives), 90, "it is retried")
    wait_for(lambda: dagster_dev.status(retry) == "STARTED", 60, "the retry has begun")
    assert dagster_dev.status(lives) == "STARTED"
    site.run_on_login(CERTIFICATE_USER, "mkdir -p data && touch data/go")
    assert dagster_dev.wait(retry) == "SUCCESS"
    assert dagster_dev.wait(lives) == "SUCCESS"
    assert len(jobs()) == 2
    assert len([each for each in jobs() if f"run={dies}" in each]) == 1
    assert [(event["runId"], event["rows"]) for event in dagster_dev.materializations("dies")] == [(retry, 7)]
    assert [event["runId"] for event in dagster_dev.materializations("lives")] == [lives]
