"""One asset around a workload that a test writes, materialised with the project's own ComputeResource."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from dagster_sbatch.launchers import Launcher, ScriptLauncher
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.slurm import SlurmRequest
from resources import PROJECT
from slurm_in_a_box.machines import MEMORY_CGROUPS

PIPES = """
from dagster_pipes import open_dagster_pipes
with open_dagster_pipes() as pipes:
"""
"""The beginning of most workloads; what follows is indented by four spaces."""
EATS = "ballast = bytearray(b'x' * (300 << 20))" + (
    ""
    if MEMORY_CGROUPS
    else "; int(os.environ['SLURM_MEM_PER_NODE']) >= 300 or "
    "(sys.stderr.write('slurmstepd: error: Detected 1 oom_kill event\\n'), os._exit(137))"
)
"""Needs 300 MB. Where the machine cannot enforce a job's memory, it does what a step does that Slurm ends for it."""


@dataclass
class Outcome:
    """What a user would see of a run.

    Attributes:
        success: of the run.
        run_id: its id.
        error: the text of the step's failure.
        failure: the metadata of the step's failure.
        retries: texts of the step's failures after which it was tried again.
        materializations: of the asset, by partition (None: not partitioned).
        checks: passed or not, by name.
        tags: of the run.
    """

    success: bool
    run_id: str
    error: str
    failure: dict[str, Any]
    retries: list[str]
    materializations: dict[str | None, list[dict[str, Any]]]
    checks: dict[str, bool]
    tags: dict[str, str]


def materialize(
    workload: str | Path,
    folder: Path,
    *,
    launcher: Launcher | None = None,
    request: SlurmRequest | None = None,
    extras: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    args: Sequence[str] = (),
    checks: tuple[str, ...] = (),
    retry_policy: dg.RetryPolicy | None = None,
    partitions: tuple[str, ...] = (),
    partition_key: str | None = None,
) -> Outcome:
    """Materialise the asset `probe` whose workload is the text, or the file, given."""
    if isinstance(workload, str):
        path = folder / "probe workload.py"
        path.write_text(textwrap.dedent(workload))
    else:
        path = workload

    @dg.asset(
        name="probe",
        retry_policy=retry_policy,
        check_specs=[dg.AssetCheckSpec(name, asset="probe") for name in checks],
        partitions_def=dg.StaticPartitionsDefinition(list(partitions)) if partitions else None,
    )
    def probe(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        return compute.run(
            context,
            workload=path,
            launcher=launcher or ScriptLauncher(),
            request=request,
            extras=extras,
            env=env,
            args=args,
        ).get_materialize_result()

    resources = {"compute": ComputeResource.of(PROJECT)}
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize(
            [probe], resources=resources, partition_key=partition_key, raise_on_error=False, instance=instance
        )
        (run,) = instance.get_runs()
    materializations: dict[str | None, list[dict[str, Any]]] = {}
    for event in result.asset_materializations_for_node("probe"):
        values = {name: value.value for name, value in event.metadata.items()}
        materializations.setdefault(event.partition, []).append(values)
    evaluations = result.get_asset_check_evaluations()
    failures = [event.step_failure_data for event in result.get_step_failure_events()]
    texts = [
        f"{data.error}\n{data.user_failure_data.description if data.user_failure_data else ''}" for data in failures
    ]
    details = {
        name: value.value
        for data in failures
        if data.user_failure_data
        for name, value in data.user_failure_data.metadata.items()
    }
    retries = [
        str(event.event_specific_data.error)  # type: ignore[union-attr]
        for event in result.filter_events(lambda event: event.event_type_value == "STEP_UP_FOR_RETRY")
    ]
    checks_passed = {found.check_name: found.passed for found in evaluations}
    return Outcome(
        result.success,
        result.run_id,
        "\n".join(texts),
        details,
        retries,
        materializations,
        checks_passed,
        dict(run.tags),
    )
