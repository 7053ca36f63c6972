"""Runs on the supercomputer in a real `dagster dev`: terminating, killing, restarting."""

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite
from support import costs_story
from support.background import nobody_left, rows_of
from support.dagster_dev import DagsterDev, beside_location, wait_for
from support.programs import make
from support.ray_run import nothing_is_left

pytestmark = pytest.mark.cluster

LOCATION = """\
import json, os
from pathlib import Path
import dagster as dg
from resources import build_resources
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch import BatchScriptLauncher, CommandLauncher, JobArray, ScriptLauncher, SlurmRequest, SrunLauncher

FOLDER = Path(__file__).parent

def waiting(name, launcher, program, array=None, tasks=1, **options):
    @dg.asset(name=name, **options)
    def probe(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        (FOLDER / f"pids-{context.run_id}").write_text(json.dumps([os.getpid(), os.getppid()]))
        workload, args = FOLDER / "workloads" / program, [name]
        request = SlurmRequest(time_limit="00:30:00", ntasks_per_node=tasks)
        done = compute.run(context, workload=workload, launcher=launcher, request=request, args=args, array=array)
        return done.get_materialize_result()
    return probe

command, batch = CommandLauncher(), BatchScriptLauncher()
launchers = {"terminated": batch, "orphaned": command, "orphaned_batch": batch, "restarted": batch}
alone = [waiting(name, launcher, "waits.sh") for name, launcher in launchers.items()]
keys, at_once = dg.StaticPartitionsDefinition(["ends", "waits"]), dg.BackfillPolicy.single_run()
ranks = waiting("ranks", SrunLauncher(), "ranks.py", tasks=2)
many = waiting("many", ScriptLauncher(), "waits.py", JobArray(), partitions_def=keys, backfill_policy=at_once)
@@STORY@@
defs = dg.Definitions(assets=[*alone, ranks, many, trains, waits_for_money], resources=build_resources())
"""

PROGRAM = f"""\
#!/bin/bash
echo begun
until [ -e {CERTIFICATE_USER.home}/go-on-$1 ]; do sleep 0.1; done
echo gone on
pipes materialize
"""

RANKS = f"""\
import os, pathlib, time
from dagster_pipes import open_dagster_pipes
with open_dagster_pipes():
    pathlib.Path("{CERTIFICATE_USER.home}", f"rank-{{os.environ['RANK']}}").touch()
    time.sleep(600)
"""

WAITS = f"""\
import pathlib, time
from dagster_pipes import open_dagster_pipes
with open_dagster_pipes() as pipes:
    print("begun", flush=True)
    waits = not pipes.is_partition_step or pipes.partition_key == "waits"
    while waits and not pathlib.Path("{CERTIFICATE_USER.home}", f"go-on-{{pipes.asset_key}}").exists():
        time.sleep(0.1)
    print("gone on", flush=True)
    pipes.report_asset_materialization()
"""


@pytest.fixture
def location(site: SimulatedSite, tmp_path: Path) -> Path:
    folder = tmp_path / "location"
    (folder / "workloads").mkdir(parents=True)
    (folder / "workloads" / "waits.py").write_text(WAITS)
    (folder / "workloads" / "ranks.py").write_text(RANKS)
    make(folder / "workloads", PROGRAM, "waits.sh")
    costs_story.write(folder, site)
    (folder / "location.py").write_text(LOCATION.replace("@@STORY@@", costs_story.LOCATION))
    return folder


@pytest.fixture
def dagster_dev(on_supercomputer: dict[str, str], location: Path, tmp_path: Path) -> Iterator[DagsterDev]:
    variables = {**on_supercomputer, "DATA_ROOT": f"{CERTIFICATE_USER.home}/data", "SLURM_KEEP_WITHIN_BUDGET": "true"}
    with beside_location(location / "location.py", tmp_path / "project", variables, projects_own=True) as server:
        yield server


def running_job(site: SimulatedSite, asset: str) -> str:
    """The asset's only job, when it runs."""

    def look() -> str:
        rows = [row for row in rows_of(site, "%i %T %j") if row[2].startswith(f"{asset}-")]
        assert len(rows) <= 1, rows
        return rows[0][0] if rows and rows[0][1] == "RUNNING" else ""

    return str(wait_for(look, 180, f"{asset} runs"))


def go_on(site: SimulatedSite, asset: str) -> None:
    site.run_on_login(CERTIFICATE_USER, f"touch go-on-{asset}")


def adopted(server: DagsterDev, site: SimulatedSite, asset: str, run_id: str, job: str) -> None:
    """The run has failed; its retry goes on with its job, to the end."""
    assert server.wait(run_id, 120) == "FAILURE"
    retry = wait_for(lambda: server.re_execution_of(run_id), 240, "Dagster tries it again")
    pids = server.folder.parent / "location" / f"pids-{retry}"
    wait_for(pids.exists, 120, "the retry has begun")
    go_on(site, asset)
    assert server.wait(retry, 120) == "SUCCESS"
    events = server.materializations(asset)
    assert [(event["runId"], event["job_id"]) for event in events] == [(retry, int(job))]
    (out,) = (server.folder / ".dagster" / "compute_logs" / retry).rglob("*.out")
    assert out.read_text() == "begun\ngone on\n"


def job_ids(site: SimulatedSite) -> set[str]:
    """Of all jobs, those that the controller has forgotten included; an array is one."""
    rows = site.sacct("-XnP", "--starttime=now-1days", "--format=JobID").split()
    return {row.partition("_")[0] for row in rows}


def test_the_life_of_a_run(dagster_dev: DagsterDev, site: SimulatedSite, location: Path, tmp_path: Path) -> None:
    before = job_ids(site)
    costs = costs_story.CostsStory(dagster_dev, site, location, tmp_path)
    story = ThreadPoolExecutor(1).submit(costs.play)  # meanwhile, on the nodes with GPUs
    orphans = ("orphaned", "orphaned_batch")
    assets = ("terminated", "ranks", *orphans, "restarted")
    runs = {asset: dagster_dev.launch(asset, location="probe") for asset in assets}
    many = dagster_dev.backfill("many", ["ends", "waits"])
    jobs = {asset: running_job(site, asset) for asset in runs}

    # Terminated in the UI: the job is cancelled, and the run ended only when it is gone.
    home = site.layout.home / CERTIFICATE_USER.name
    wait_for(lambda: all((home / f"rank-{rank}").exists() for rank in (0, 1)), 60, "both ranks run")
    for asset in ("terminated", "ranks"):
        dagster_dev.terminate(runs[asset])
    for asset in ("terminated", "ranks"):
        assert dagster_dev.wait(runs[asset], 90) == "CANCELED"
        assert site.job_state(int(jobs[asset])) == "CANCELLED"

    # The run worker is killed: its step lives on for a while, and leaves the job to the retry.
    pids = [json.loads((location / f"pids-{runs[asset]}").read_text()) for asset in orphans]
    for _, worker in pids:
        os.kill(worker, signal.SIGKILL)
    wait_for(lambda: not any(Path(f"/proc/{step}").exists() for step, _ in pids), 60, "their steps have ended")
    for asset in orphans:
        adopted(dagster_dev, site, asset, runs[asset], jobs[asset])

    # The backfill of an array job is cancelled: what is complete is kept.
    wait_for(
        lambda: any("2 tasks: 1 done, 1 running" in f"{line}" for line in dagster_dev.messages(many)), 60, "one is done"
    )
    dagster_dev.cancel_backfill_of(many)
    assert dagster_dev.wait(many, 90) == "CANCELED"
    assert [event["partition"] for event in dagster_dev.materializations("many")] == ["ends"]
    rows = [row for row in rows_of(site, "%T %j", "--array") if row[1].startswith("many-")]
    assert sorted(state for state, _ in rows) == ["CANCELLED", "COMPLETED"]

    story.result(300)

    # Dagster is stopped and started again.
    dagster_dev.stop()
    assert site.job_state(int(jobs["restarted"])) == "RUNNING"
    nobody_left(site, 90)
    dagster_dev.start()
    adopted(dagster_dev, site, "restarted", runs["restarted"], jobs["restarted"])

    assert len(job_ids(site) - before) == 6 + costs.jobs
    nothing_is_left(site)
    nobody_left(site)
