"""One asset whose tasks a test writes, run over ranges of partitions and re-executed as the UI does it."""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import dagster as dg

from dagster_sbatch import ComputeResource, JobArray, ScriptLauncher, SlurmRequest
from resources import PROJECT
from support.instances import make_instance
from support.workload_asset import PIPES

DAYS = dg.DailyPartitionsDefinition("2013-01-01", end_date="2013-01-13")
"""Twelve of them."""
_assets: "list[ArrayAsset]" = []


@dataclass
class ArrayOutcome:
    """What a user would see of a run.

    Attributes:
        success: of the run.
        error: the text of the step's failure.
        failure: the metadata of the step's failure.
        metadata: of each materialization of this run, by partition.
        checks: evaluations of this run, by the check's name.
        log: lines of the run's log.
        run_id: of the run.
    """

    success: bool
    error: str
    failure: Mapping[str, Any]
    metadata: dict[str | None, list[dict[str, Any]]]
    checks: dict[str, list[dg.AssetCheckEvaluation]]
    log: list[str]
    run_id: str

    @property
    def once(self) -> dict[str | None, dict[str, Any]]:
        """The metadata of each partition, which has exactly one materialization."""
        assert all(len(events) == 1 for events in self.metadata.values()), self.metadata
        return {partition: events[0] for partition, events in self.metadata.items()}


class ArrayAsset:
    """The asset `probe`, in a Dagster instance of its own."""

    def __init__(
        self,
        folder: Path,
        workload: str,
        array: JobArray | None,
        *,
        partitions: dg.PartitionsDefinition | None = DAYS,
        checks: tuple[str, ...] = (),
        blocking: bool = False,
        retry_policy: dg.RetryPolicy | None = None,
        code_version: str | None = None,
        **call: Any,
    ) -> None:
        self._code_version, self._blocking = code_version, blocking
        self._folder, self.array, self.partitions, self._checks = folder, array, partitions, checks
        self._retry_policy, self.call = retry_policy, {"launcher": ScriptLauncher(), "request": SlurmRequest(), **call}
        self.completed: list[Any] = []
        self._number = len(_assets)
        _assets.append(self)
        (folder / "workloads").mkdir(parents=True, exist_ok=True)
        if not (folder / "dagster").exists():
            make_instance(folder / "dagster")
        self.change(workload)

    def change(self, workload: str) -> None:
        """Write another workload: what its tasks do in their Pipes session."""
        body = textwrap.indent(textwrap.dedent(workload), "    ")
        (self._folder / "workloads" / "workload.py").write_text(f"{PIPES}\n{body}\n")

    def definitions(self) -> dg.Definitions:
        """Return the code location: the asset reads `readings`, which others materialize."""
        readings = dg.AssetSpec("readings", partitions_def=self.partitions)

        @dg.asset(
            deps=[readings],
            partitions_def=self.partitions,
            backfill_policy=dg.BackfillPolicy.single_run() if self.partitions else None,
            check_specs=[dg.AssetCheckSpec(name, asset="probe", blocking=self._blocking) for name in self._checks],
            retry_policy=self._retry_policy,
            code_version=self._code_version,
        )
        def probe(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
            workload = self._folder / "workloads" / "workload.py"
            done = compute.run(context, workload=workload, array=self.array, **self.call)
            self.completed.append(done)
            return done.get_materialize_result()

        job = dg.define_asset_job("all", selection="probe", executor_def=dg.in_process_executor)
        return dg.Definitions(assets=[readings, probe], jobs=[job], resources={"compute": ComputeResource.of(PROJECT)})

    def run(
        self, first: str = "", last: str = "", *, of: str | None = None, from_failure: bool = False, **tags: str
    ) -> ArrayOutcome:
        """Run a range of partitions.

        Args:
            first: partition; empty for an asset without partitions.
            last: partition; empty: the first one alone, as the UI runs one.
            of: id of a run; then this one is its re-execution.
            from_failure: whether that is *Re-execute from failure*.
            tags: further tags of the run.
        """
        if last:
            tags |= {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}
        elif first:
            tags |= {"dagster/partition": first}
        options: dict[str, Any] = {}
        job = dg.build_reconstructable_job(__name__, make_job.__name__, None, {"number": self._number})
        with dg.DagsterInstance.from_config(str(self._folder / "dagster")) as instance:
            if of:
                parent = instance.get_run_by_id(of)
                assert parent
                options["reexecution_options"] = dg.ReexecutionOptions(parent_run_id=of)
                tags["dagster/root_run_id"] = parent.root_run_id or of
            if from_failure:
                tags["dagster/is_resume_retry"] = "true"
            # It would configure Python's logging anew, which deadlocks with a run in another thread of this process.
            with (
                patch.object(instance, "get_yaml_python_handlers", list),
                dg.execute_job(job, instance, tags=tags, raise_on_error=False, **options) as result,
            ):
                return _outcome(result, instance)


def make_job(number: int) -> dg.JobDefinition:
    """Return the job of one of the assets of this process; Dagster calls this, and keeps it."""
    return _assets[number].definitions().resolve_job_def("all")


def _outcome(result: dg.JobExecutionResult, instance: dg.DagsterInstance) -> ArrayOutcome:
    records = instance.get_records_for_run(result.run_id).records
    metadata: dict[str | None, list[dict[str, Any]]] = {}
    checks: dict[str, list[dg.AssetCheckEvaluation]] = {}
    for record in records:
        stored = record.event_log_entry.asset_materialization
        if stored:
            metadata.setdefault(stored.partition, []).append(
                {name: value.value for name, value in stored.metadata.items()}
            )
    for event in result.all_events:
        if event.event_type_value == "ASSET_CHECK_EVALUATION":
            evaluation = event.event_specific_data
            assert isinstance(evaluation, dg.AssetCheckEvaluation)
            checks.setdefault(evaluation.check_name, []).append(evaluation)
    failures = [event.step_failure_data for event in result.all_events if event.is_step_failure]
    users = [data.user_failure_data for data in failures if data.user_failure_data]
    error = "\n".join(f"{user.description}" for user in users) or "\n".join(str(data.error) for data in failures)
    values = {name: value.value for user in users for name, value in user.metadata.items()}
    log = [record.event_log_entry.user_message for record in records]
    return ArrayOutcome(result.success, error, values, metadata, checks, log, result.run_id)
