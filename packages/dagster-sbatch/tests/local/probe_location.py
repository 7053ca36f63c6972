"""A code location of the tests: assets whose workloads sleep, talk a lot, or are many. Loaded by `dagster dev`."""

import os
import warnings
from pathlib import Path

import dagster as dg

from dagster_sbatch import (
    BatchScriptLauncher,
    CommandLauncher,
    ComputeResource,
    JobArray,
    Launcher,
    RayLauncher,
    ScriptLauncher,
    SlurmRequest,
    SrunLauncher,
)
from resources import build_resources

WORKLOADS = Path(os.environ["PROBE_WORKLOADS"])
warnings.filterwarnings("ignore", category=dg.BetaWarning)  # as in the template: `backfill_policy` is one


@dg.asset
def sleeper(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    """Never ends by itself."""
    return compute.run(context, workload=WORKLOADS / "sleeper.py", launcher=ScriptLauncher()).get_materialize_result()


@dg.asset
def srun_sleeper(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    """Has two ranks that never end."""
    workload, request = WORKLOADS / "sleeper.py", SlurmRequest(ntasks_per_node=2)
    return compute.run(context, workload=workload, launcher=SrunLauncher(), request=request).get_materialize_result()


@dg.asset
def ray_sleeper(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    """Has a Ray task that never ends; Ray gives its processes groups of their own."""
    return compute.run(context, workload=WORKLOADS / "ray_sleeper.py", launcher=RayLauncher()).get_materialize_result()


@dg.asset
def talker(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    """Writes 1,000 lines to stdout and a few to stderr."""
    return compute.run(context, workload=WORKLOADS / "talker.py", launcher=ScriptLauncher()).get_materialize_result()


def run_program(name: str, program: str, launcher: Launcher) -> dg.AssetsDefinition:
    """An asset whose program gets the id of the run."""

    @dg.asset(name=name)
    def asset(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        workload, args = WORKLOADS / program, [context.run_id]
        return compute.run(context, workload=workload, launcher=launcher, args=args).get_materialize_result()

    return asset


programs = [
    run_program(f"{name}_{program}", f"{program}.sh", launcher)
    for name, launcher in (("command", CommandLauncher()), ("batch_script", BatchScriptLauncher()))
    for program in ("talker", "sleeper")
]


@dg.asset(
    partitions_def=dg.DailyPartitionsDefinition("2021-01-01", end_date=os.environ["PROBE_END"]),
    backfill_policy=dg.BackfillPolicy.single_run(),
)
def weather(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    """The mean temperature of each day."""
    return compute.run(
        context,
        workload=WORKLOADS / "weather.py",
        launcher=ScriptLauncher(),
        args=[context.partition_keys[-1]],
        array=JobArray(partitions_per_task=10),
    ).get_materialize_result()


defs = dg.Definitions(
    assets=[sleeper, srun_sleeper, ray_sleeper, talker, weather, *programs],
    resources=build_resources(),
    executor=dg.in_process_executor,
)
