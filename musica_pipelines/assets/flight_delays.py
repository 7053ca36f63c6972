"""Will this flight be late? From the published flights of 2013 to a model of their delays."""

from pathlib import Path

import dagster as dg

from dagster_sbatch import ComputeResource, JobArray, RayLauncher, ScriptLauncher, SlurmRequest, SrunLauncher

WORKLOADS = Path(__file__).resolve().parent.parent / "workloads"
GROUP = "flight_delays"
OWNERS = ["team:flight-delays"]
TRIALS = 12

months = dg.MonthlyPartitionsDefinition(start_date="2013-01", end_date="2014-01", fmt="%Y-%m")


@dg.asset(
    partitions_def=months,
    backfill_policy=dg.BackfillPolicy.single_run(),
    group_name=GROUP,
    owners=OWNERS,
    kinds={"python", "parquet"},
    check_specs=[
        dg.AssetCheckSpec(
            "rows_match_source", asset="flights", description="Every published flight was written, none twice."
        )
    ],
)
def flights(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    """Every scheduled flight out of New York City, one parquet file per month (`flights/YYYY-MM.parquet`)."""
    return compute.run(
        context,
        workload=WORKLOADS / "flights.py",
        launcher=ScriptLauncher(),
        request=SlurmRequest(cpus_per_task=2, mem="8G", time_limit="00:10:00"),
    ).get_materialize_result()


@dg.asset(
    deps=[flights],
    partitions_def=months,
    backfill_policy=dg.BackfillPolicy.single_run(),
    automation_condition=dg.AutomationCondition.eager(),
    group_name=GROUP,
    owners=OWNERS,
    kinds={"python", "pandas", "parquet"},
    check_specs=[
        dg.AssetCheckSpec(
            "one_row_per_arrival", asset="delay_features", description="Every flight that arrived is there."
        ),
        dg.AssetCheckSpec("no_nulls", asset="delay_features", description="No feature is missing anywhere."),
    ],
)
def delay_features(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    """What is known an hour before departure: schedule, route, plane and weather; and whether the flight was late."""
    return compute.run(
        context,
        workload=WORKLOADS / "delay_features.py",
        launcher=ScriptLauncher(),
        request=SlurmRequest(cpus_per_task=2, mem="8G", time_limit="00:10:00"),
        array=JobArray(),  # one task per month
    ).get_materialize_result()


@dg.asset(
    deps=[delay_features],
    group_name=GROUP,
    owners=OWNERS,
    kinds={"ray", "slurm", "xgboost"},
    pool="gpu",
    check_specs=[
        dg.AssetCheckSpec(
            "better_than_baseline", asset="delay_sweep", description="The best trial beats the rate by hour of day."
        )
    ],
)
def delay_sweep(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    """Search hyperparameters for the delay model on Ray, one trial per GPU, or per CPU without GPUs."""
    return compute.run(
        context,
        workload=WORKLOADS / "delay_sweep.py",
        launcher=RayLauncher(),
        request=SlurmRequest(nodes=2, gpus_per_node=4, time_limit="02:00:00"),
        extras={"trials": TRIALS},
    ).get_materialize_result()


@dg.asset(
    deps=[delay_sweep, delay_features],
    automation_condition=dg.AutomationCondition.eager(),
    group_name=GROUP,
    owners=OWNERS,
    kinds={"python", "xgboost"},
    check_specs=[
        dg.AssetCheckSpec(
            "better_than_baseline",
            asset="delay_model",
            description="On months it never saw, the model beats the rate by hour of day.",
        )
    ],
)
def delay_model(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    """The best trial's model, trained on all months but the last two and judged on those."""
    return compute.run(
        context,
        workload=WORKLOADS / "delay_model.py",
        launcher=ScriptLauncher(),
        request=SlurmRequest(cpus_per_task=8, mem="32G", time_limit="00:30:00"),
    ).get_materialize_result()


@dg.asset(
    deps=[delay_sweep, delay_features],
    group_name=GROUP,
    owners=OWNERS,
    kinds={"python", "slurm", "xgboost"},
    pool="gpu",
    check_specs=[
        dg.AssetCheckSpec(
            "better_than_baseline",
            asset="delay_forest",
            description="On months it never saw, the forest beats the rate by hour of day.",
        )
    ],
)
def delay_forest(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    """The best trial's parameters as a boosted forest, one model trained by all GPUs of a node; on a laptop by CPUs."""
    return compute.run(
        context,
        workload=WORKLOADS / "delay_forest.py",
        launcher=SrunLauncher(),  # one process per GPU
        request=SlurmRequest(ntasks_per_node=4, gpus_per_node=4, time_limit="00:30:00"),
    ).get_materialize_result()
