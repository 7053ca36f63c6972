"""The tasks of one call of `compute.run` as the Dagster step sees them, wherever they run."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import dagster as dg

from dagster_sbatch.run.array_results import (
    CheckOutcome,
    CompletedArray,
    TaskResult,
    attempts_metadata,
    combine_checks,
    read_outcome,
    read_result,
    summarize,
)
from dagster_sbatch.run.calls import calls_of
from dagster_sbatch.run.completed import CompletedPartitions
from dagster_sbatch.run.failures import failure, shorten
from dagster_sbatch.run.history import DATA_VERSION, reported_version
from dagster_sbatch.run.messages import explain_failure
from dagster_sbatch.run.past_use import proposal_metadata, uses_of
from dagster_sbatch.run.pipes import TaskContexts, open_session
from dagster_sbatch.run.plan import Plan
from dagster_sbatch.run.reports import StepLog
from dagster_sbatch.run.results import add_metadata, attach, note_missing_checks, partitions_of
from dagster_sbatch.run.task_failures import FailedTask, TaskFailures
from dagster_sbatch.run.task_output import ArrayProgress, TaskReader, Warnings
from dagster_sbatch.slurm import SlurmRequest
from dagster_sbatch.slurm.outcome import explain_stderr
from dagster_sbatch.slurm.units import count_of

MOST_REPEATED = 10  # repeated warnings that the log names at the end
_STORED = "If a partition was removed during the run: all others are stored. Compute what is missing in a new run."
_AGAIN = "\nRe-execute this run from failure: it runs only the tasks that have not succeeded."


class ArrayStep:
    """The tasks of one call: read what they write and report, store it, and return the results of the call."""

    def __init__(self, context: dg.OpExecutionContext, name: str, plan: Plan) -> None:
        """Find out which partitions are done.

        Raises Failure: this step has called `compute.run` with an array of partitions before.
        """
        self._context, self._name, self._plan = context, name, plan
        self._log = StepLog(context)
        by_partition = any(task.partitions for task in plan.tasks)
        if by_partition and not calls_of(context).claim_once("partitions"):
            raise failure(
                name,
                "this step has already called compute.run with an array of its partitions. Dagster stores a partition "
                "only once, and could not distinguish the calls. Make a separate asset for each call.",
                final=True,
            )
        self._completed = CompletedPartitions(context, plan.tasks)
        self.tasks, self.left = self._completed.tasks, self._completed.left  # left: indices
        self.attempts: list[dict[str, Any]] = []  # rows of a table: of the tasks that were repeated
        self.where: Mapping[str, Any] = {}  # metadata for all results
        self.progress = ArrayProgress(len(self.tasks), len(self.tasks) - len(self.left), self._log.info)
        self._readers: dict[int, TaskReader] = {}
        self._results: dict[int, TaskResult] = {}
        self._reported_by: dict[tuple[str, dg.AssetKey], str] = {}
        self._failures, self._warnings = TaskFailures(), Warnings()
        self._storer: ThreadPoolExecutor | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Open the Pipes session of all tasks, and log their progress."""
        with open_session(self._context, self._plan.extras) as session:
            self._session = session
            definition = self._context.assets_def.partitions_def if self._context.has_assets_def else None
            self.contexts = TaskContexts(session.context, definition, self.tasks)
            self._completed.report(self._log.info)
            with self.progress.shown():
                yield

    # Single tasks

    def reader(self, index: int) -> TaskReader:
        """Return what reads the output of a task; it exists until the task's end."""
        if index not in self._readers:
            self._readers[index] = TaskReader(self.tasks[index], self._session, self._warnings)
        return self._readers[index]

    def ended(
        self,
        index: int,
        exit_code: int,
        where: Mapping[str, Any],
        costs: Mapping[str, Any],
        logs: str,
        *,
        request: SlurmRequest | None = None,
        limit: str = "",
    ) -> bool:
        """Judge a task by its exit code and its messages, after its last byte; return whether it succeeded.

        `exit_code`: of its process; negative is the signal that ended it. `request`: of its job; None: that of the
        plan. `limit`: of the retries that was reached, for the cause of its failure.
        """
        task, reader = self.tasks[index], self.reader(index)
        messages = reader.messages
        messages.read_last_line()
        cause = explain_failure(messages, exit_code, self._plan.workload.name)
        if cause:
            cause = explain_stderr(cause, reader.stderr.tail, request or self._plan.allocation.request) + limit
        else:
            try:
                result = read_result(self._context, task, messages, dict(where), dict(costs))
                self._check_partitions(result)
            except Exception as error:  # noqa: BLE001 - Dagster raises its own for each kind of wrong report
                cause = f"what {self._plan.workload.name} reported cannot be used: {shorten(str(error))}"
        if cause is not None:
            self.failed(index, cause, logs)
            return False
        self.stop_reading(index)
        self.progress.done += 1
        self._results[index] = result
        if self._storer:
            self._storer.submit(self._materialize, result)
        return True

    def failed(self, index: int, cause: str, logs: str) -> None:
        """Register that a task has failed for good, and store what others have completed: the step will fail."""
        reader = self.stop_reading(index)
        self.progress.failed += 1
        task = self.tasks[index]
        if self._failures.add(FailedTask(index, task, cause, reader.stderr.tail if reader else "", logs)):
            self._log.error(f"Task {task.label} failed: {cause}\nLogs: {logs}\nThe other tasks continue.")
        self.store_completed()

    def stop_reading(self, index: int) -> TaskReader | None:
        """Register that a task does not run any more: it is over, or waits to run once more. What it reported is lost.

        Returns what has read its output; None if there was none.
        """
        self.progress.started.discard(index)
        reader = self._readers.pop(index, None)
        if reader:
            reader.finish()
        return reader

    def add_costs(self, index: int, costs: Mapping[str, Any]) -> None:
        """Add numbers of a task's job that became known after its end."""
        if index in self._results:
            self._results[index].costs.update(costs)

    def _check_partitions(self, result: TaskResult) -> None:
        """Refuse a report on a partition that another task has reported: parameter sets share the run's partitions."""
        if result.task.partitions:
            return
        for report in result.reports:
            other = self._reported_by.setdefault((report.partition, report.asset), result.task.name)
            if other != result.task.name:
                raise ValueError(
                    f"the partition {report.partition!r} was reported by task {other!r} before. "
                    "Let only one task report it, or use a custom message of your own"
                )

    # Results of the call

    def store_completed(self) -> None:
        """Materialize the partitions of tasks when they have succeeded: the step itself will not.

        A thread of its own does it: Dagster takes so long for a thousand events that the agent would leave meanwhile,
        and jobs would be cancelled too late. Nothing is stored if a partition needs more than its task.
        """
        if self._completed.stores_early and self._storer is None:
            self._storer = ThreadPoolExecutor(1, "materializations")
            for result in self._results.values():
                self._storer.submit(self._materialize, result)

    def wait_until_stored(self) -> None:
        """Wait until Dagster has stored what `store_completed` began; call it when all tasks have ended."""
        if self._storer:
            self._storer.shutdown()

    def _materialize(self, result: TaskResult) -> None:
        """Store the partitions of a task now. If Dagster cannot, the next attempt computes them again."""
        if not result.task.partitions:
            return
        try:
            versions = {(each.partition, each.asset): each.data_version for each in result.reports if each.data_version}
            for (partition, key), metadata in result.of_partitions(self._context.selected_asset_keys).items():
                tags, stored = self._completed.tags(result.task, partition), {**self.where, **metadata}
                if version := versions.get((partition, key)):
                    tags[DATA_VERSION] = stored["data_version"] = version
                self._context.log_event(dg.AssetMaterialization(key, metadata=stored, partition=partition, tags=tags))
        except Exception as error:  # noqa: BLE001 - each database has errors of its own
            self._log.error(f"Dagster could not store the result of task {result.task.label}: {error}")

    def complete(self) -> dg.PipesClientCompletedInvocation:
        """Return the results, or raise the step's failure; results that Dagster refuses are stored by partition."""
        if repeated := sorted(self._warnings.repeated.items(), key=lambda item: -item[1]):
            lines = [f"{count_of(count, 'more time')}: {text}" for text, count in repeated[:MOST_REPEATED]]
            self._log.warning("Warnings that several tasks have written are shown once:\n" + "\n".join(lines))
        if self._failures:
            raise self._failure()
        try:
            return self._combine()
        except Exception as error:
            self.store_completed()
            self.wait_until_stored()
            text = f"Dagster refuses the results of the step: {shorten(str(error))}\n{_STORED}"
            raise failure(self._name, text) from error

    def _combine(self) -> dg.PipesClientCompletedInvocation:
        """Attach what tasks reported to the materializations that Dagster makes at the end of the step."""
        context, results = self._context, [self._results[index] for index in sorted(self._results)]
        single = len(partitions_of(context)) == 1
        for partition, assets in self._completed.stored.items():
            for key, stored in assets.items():
                add_metadata(context, key, partition, stored.metadata)
                if single and (version := reported_version(stored)):
                    context.set_data_version(key, dg.DataVersion(version))
        for result in results:
            attach(context, result.reports, result.of_partitions(context.selected_asset_keys))
        checks = combine_checks(context.selected_asset_check_keys, results, self._earlier_checks())
        note_missing_checks(context, checks)
        metadata, place = {**self.where, **attempts_metadata(self.attempts)}, self.where.get("partition")
        uses = [use for each in results for use in uses_of(each.costs, each.task.partitions or [each.task.name], place)]
        proposal = proposal_metadata(context, self._plan, uses)
        if not any(task.partitions for task in self.tasks):
            metadata |= {**summarize(results), **proposal}
        elif results and context.selected_asset_keys:
            add_metadata(context, min(context.selected_asset_keys), results[0].task.partitions[0], proposal)
        return CompletedArray(context, self._session.pipes, metadata, results, checks, len(self._completed.stored))

    def _earlier_checks(self) -> dict[dg.AssetCheckKey, list[CheckOutcome]]:
        """Return the outcomes of the checks for the partitions that an earlier run has computed."""
        found: dict[dg.AssetCheckKey, list[CheckOutcome]] = {}
        for check in self._context.selected_asset_check_keys:
            for partition, assets in self._completed.stored.items():
                stored = assets.get(check.asset_key)
                if stored and (outcome := read_outcome(check, partition, stored.metadata)):
                    found.setdefault(check, []).append(outcome)
        return found

    def _failure(self) -> dg.Failure:
        number, total = len(self._failures), len(self.tasks)
        kept = [self.tasks[index] for index in self._results if self.tasks[index].partitions]
        head = f"{number} of {count_of(total, 'task')} failed."
        if self._completed.stores_early and (kept or self._completed.stored):
            stored = sum(len(task.partitions) for task in kept) + len(self._completed.stored)
            head += f" The other tasks have materialized {count_of(stored, 'partition')}.{_AGAIN}"
        return failure(
            self._name,
            f"{head}\n\n{self._failures.describe()}",
            **self._failures.metadata(),
            **attempts_metadata(self.attempts),
        )
