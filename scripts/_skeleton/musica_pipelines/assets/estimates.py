"""One small asset to start with: replace it by your own."""

from pathlib import Path

import dagster as dg
from dagster_sbatch import ComputeResource, ScriptLauncher, SlurmRequest

WORKLOADS = Path(__file__).resolve().parent.parent / "workloads"
POINTS = 200_000


@dg.asset(
    group_name="estimates",
    owners=["team:estimates"],
    kinds={"python", "slurm"},
    check_specs=[dg.AssetCheckSpec("near_pi", asset="pi_estimate", description="Within three standard errors of pi.")],
)
def pi_estimate(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    """Pi, from random points in a square: what share of them lies within the circle?"""
    return compute.run(
        context,
        workload=WORKLOADS / "pi_estimate.py",
        launcher=ScriptLauncher(),
        request=SlurmRequest(cpus_per_task=1, mem="1G", time_limit="00:05:00"),
        extras={"points": POINTS},
    ).get_materialize_result()
