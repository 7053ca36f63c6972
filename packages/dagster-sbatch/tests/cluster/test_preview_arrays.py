"""`scripts/preview --test-only` with arrays: what the real Slurm says to the first array job."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch.inspect.asset_preview import preview_asset
from dagster_sbatch.inspect.dry_run import try_script
from dagster_sbatch.inspect.remote_runs import open_runs
from dagster_sbatch.launchers import ScriptLauncher
from dagster_sbatch.run.array import JobArray
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.slurm import SlurmRequest
from dagster_sbatch.slurm.gateway import Limits
from resources import PROJECT
from slurm_in_a_box import CPU_PARTITION
from slurm_in_a_box.slurm_configuration import ACCOUNT

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("on_supercomputer")]


@dg.asset
def rates(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    array = JobArray(tasks={f"rate={number}": {"rate": number} for number in range(2500)}, max_running_tasks=4)
    request, launcher = SlurmRequest(time_limit="10"), ScriptLauncher()
    return compute.run(
        context, workload=Path(__file__), launcher=launcher, request=request, array=array
    ).get_materialize_result()


def test_slurm_is_asked_about_an_array_job_within_its_limits() -> None:
    definitions = dg.Definitions(assets=[rates], resources={"compute": ComputeResource.of(PROJECT)})
    numbers: dict[str, Any] = {
        "partition": CPU_PARTITION,
        "elapsed_seconds": 60.0,
        "node_hours": 0.016667,
        "cpu_hours": 0.016667,
    }
    with dg.DagsterInstance.ephemeral() as instance:
        instance.report_runless_asset_event(dg.AssetMaterialization("rates", metadata=numbers))
        (shown,) = preview_asset(definitions, "rates", history=instance)
    with open_runs(PROJECT.load_settings(), PROJECT, 60) as runs:
        accepted, said = try_script(runs.gateway, shown, runs.gateway.projects())
        limits = runs.gateway.limits(str(shown.plan.allocation.request.partition))
        largest, too_large = (shown.render(limits).replace("=0-2499%", f"=0-{last}%") for last in last_indices(limits))
        answers = [runs.gateway.test(script) for script in (largest, too_large)]
    assert accepted, said
    head, started, charged, proposed = said.splitlines()
    assert head.startswith(f"2500 tasks in 1 array job; Slurm accepts {limits.array} tasks per array job and ")
    assert " to start at " in started
    assert charged == f"charged to project {ACCOUNT}"
    assert proposed.startswith('the proposed request, SlurmRequest(time_limit="00:05:00"), would start at ')
    assert [answer[0] for answer in answers] == [True, False]
    assert "Invalid job array specification" in answers[1][1]


def last_indices(limits: Limits) -> tuple[int, int]:
    """Of the largest array job that Slurm accepts, and of one that is too large."""
    assert limits.array
    return limits.array - 1, limits.array
