"""A multi-asset that Dagster divides into two steps: their names depend on the assets that a run selects."""

import os
from pathlib import Path

import pytest

from slurm_in_a_box import SimulatedSite, wait_until
from support.background import WAITS, go_on, only_job, runs_there
from support.step import Step, kill

pytestmark = pytest.mark.cluster

PROGRAM = """\
import json, os, sys
from pathlib import Path
import dagster as dg
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.execution.api import execute_run
from resources import build_resources
from dagster_sbatch import ComputeResource, ScriptLauncher, SlurmRequest

FOLDER = Path(__file__).parent

SPECS = [dg.AssetSpec("a", skippable=True), dg.AssetSpec("b", deps=["c"], skippable=True)]

@dg.multi_asset(specs=SPECS, can_subset=True)
def ab(context: dg.AssetExecutionContext, compute: ComputeResource):
    if dg.AssetKey("a") in context.selected_asset_keys:
        yield dg.MaterializeResult("a")
        return
    request = SlurmRequest(time_limit="00:30:00")
    workload = FOLDER / "workloads" / "workload.py"
    yield from compute.run(context, workload=workload, launcher=ScriptLauncher(), request=request).get_results()

@dg.asset(deps=["a"])
def c():
    pass

if __name__ == "__main__":
    job = dg.define_asset_job("all", executor_def=dg.in_process_executor)
    job = dg.Definitions(assets=[ab, c], jobs=[job], resources=build_resources()).resolve_job_def("all")
    options = {}
    if parent := next(iter(sys.argv[1:]), None):  # as "From asset failure" does it
        job, root = job.get_subset(asset_selection={dg.AssetKey("b")}), {"dagster/root_run_id": parent}
        options = {"root_run_id": parent, "parent_run_id": parent, "asset_selection": {dg.AssetKey("b")}, "tags": root}
    with dg.DagsterInstance.get() as instance:
        run = instance.create_run_for_job(job, **options)
        done = execute_run(InMemoryJob(job), run, instance, raise_on_error=False)
        failed = [str(event.step_failure_data.error) for event in done.all_events if event.is_step_failure]
        steps = [event.step_key for event in done.all_events if event.is_step_success]
        (FOLDER / f"result-{os.getpid()}").write_text(json.dumps([done.success, failed, {"steps": steps}]))
"""


def test_the_job_of_a_step_that_has_another_name_now_is_adopted(
    site: SimulatedSite, tmp_path: Path, on_supercomputer: dict[str, str]
) -> None:
    """`ab_2` of the first run is `ab` of a re-execution from asset failure; `ab` of the first run was another step."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    step = Step(tmp_path / "step", {**kept, **on_supercomputer}, WAITS, PROGRAM)
    process = step.start(again=False)
    job = only_job(site, "RUNNING")
    kill(process)
    process = step.start(again=True)
    wait_until(lambda: f"Slurm job {job} was submitted by an earlier run of this step" in step.log, "adoption", 60)
    go_on(site)
    success, error, metadata = step.result(process)
    assert (success, error, metadata["steps"]) == (True, "", ["ab"])
    assert len(runs_there(site)) == 1
