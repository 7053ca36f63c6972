"""Read what the tasks of an array report, and combine it into one result for each asset and check."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dagster as dg

from dagster_sbatch.run.array import Task
from dagster_sbatch.run.attempts import ATTEMPTS
from dagster_sbatch.run.messages import Messages
from dagster_sbatch.run.results import (
    UNREAD,
    ByPartition,
    Completed,
    PartitionReport,
    hand_over,
    in_json,
    merge,
    read_partitions,
    report_on,
)
from dagster_sbatch.slurm.units import count_of

_SUMS = ("node_hours", "cpu_hours", "gpu_hours", "workload_seconds")  # numbers of jobs that can be added
MOST_ROWS = 200  # of a table in the metadata: Dagster stores it with the event
CHECK = "check {}"  # metadata of a partition: whether the asset check of that name passed for it
CHECK_DETAILS = CHECK + " details"
"""Metadata of a partition: severity of the asset check of that name, and what was reported with it, as JSON."""
LONGEST_TEXT = 200  # characters of what is kept of the metadata of a check


@dataclass(slots=True)
class TaskResult:
    """What is kept of a task that succeeded."""

    task: Task
    where: dict[str, Any]  # metadata of its job
    costs: dict[str, Any]  # numbers of its job
    reports: list[PartitionReport] = field(default_factory=list)  # on its partitions, by asset
    # What it reported of its assets as a whole, by name; with several assets, the names begin with `ASSET: `
    metadata: dict[str, Any] = field(default_factory=dict)
    # The outcome of each asset check that it reported
    checks: dict[dg.AssetCheckKey, "dg.AssetCheckResult"] = field(default_factory=dict)
    messages: list[Any] = field(default_factory=list)  # its own custom messages

    def of_partitions(self, assets: Iterable[dg.AssetKey]) -> ByPartition:
        """Return the metadata of each of its partitions; the first partition of the first asset has the costs."""
        partitions, keys = self.task.partitions, sorted(assets)
        found = merge(self.reports, {(partition, key): dict(self.where) for partition in partitions for key in keys})
        for check, result in self.checks.items():
            for partition in partitions if check.asset_key in keys else ():  # a check may run without its asset
                entry = found[partition, check.asset_key]
                entry[CHECK.format(check.name)] = bool(result.passed)
                details = {"severity": result.severity.value, "reported": shorten_metadata(result)}
                entry[CHECK_DETAILS.format(check.name)] = dg.MetadataValue.json(details)
        if partitions and keys:
            found[partitions[0], keys[0]].update(self.costs)
        return found


def shorten_metadata(result: dg.AssetCheckResult) -> str:
    """Return the metadata of a check as a short text."""
    text = ", ".join(f"{name}={value.value}" for name, value in (result.metadata or {}).items())
    return text[:LONGEST_TEXT]


def read_result(
    context: dg.OpExecutionContext,
    task: Task,
    messages: Messages,
    where: dict[str, Any],
    costs: dict[str, Any],
) -> TaskResult:
    """Read what a task has reported.

    `messages`: of the task, after the last byte.
    Raises ValueError: it reported a partition of another task, an asset or a check that is not of this step or that it
    has reported before, or what Dagster cannot read.
    """
    result = TaskResult(task, where, costs)
    handler = dg.PipesMessageHandler(context, UNREAD)
    for message in messages.read_results():
        hand_over(context, message, handler.handle_message)
    result.messages.extend(handler.get_custom_messages())
    for each in handler.get_reported_results():
        if isinstance(each, dg.AssetCheckResult):
            assert each.asset_key is not None
            assert each.check_name is not None
            result.checks[dg.AssetCheckKey(each.asset_key, each.check_name)] = each
            continue
        assert each.asset_key is not None
        result.reports += [report_on(each, partition) for partition in task.partitions]
        prefix = f"{each.asset_key.to_user_string()}: " if len(context.selected_asset_keys) > 1 else ""
        result.metadata |= {f"{prefix}{name}": value for name, value in (each.metadata or {}).items()}
        if each.data_version:  # Dagster stores one per asset and step
            result.metadata[f"{prefix}data_version"] = dg.MetadataValue.text(each.data_version.value)
    if messages.partitions:
        result.reports += read_partitions(context, messages.partitions, task.partitions)
    return result


class CompletedArray(Completed):
    """The results of an array; an asset uses them like the result of a single workload."""

    def __init__(
        self,
        context: dg.OpExecutionContext,
        session: dg.PipesSession,
        metadata: Mapping[str, Any],
        results: Sequence[TaskResult],
        checks: Sequence[dg.AssetCheckResult],
        skipped: int,
    ) -> None:
        """`skipped`: number of partitions that earlier runs have completed; nobody knows what their tasks reported."""
        super().__init__(context, session, metadata)
        self._checks, self._skipped = checks, skipped
        self._tasks = {each.task.name: each for each in results}

    @property
    def tasks(self) -> dict[str, TaskResult]:
        """What each task reported, by the task's name.

        Raises Failure: this run has skipped partitions that earlier runs have completed.
        """
        if self._skipped:
            text = (
                f"Earlier runs have completed {count_of(self._skipped, 'partition')} of this run. The asset reads what "
                "their tasks reported, but that is not kept. Re-execute all of this run. If the asset returns a value, "
                "declare the value's type, `-> dg.MaterializeResult[dict]`: then no run skips partitions."
            )
            raise dg.Failure(text, allow_retries=False)
        return self._tasks

    def get_results(self, *, implicit_materializations: bool = True) -> Sequence[Any]:
        """Return a result for each asset, and for each check that a task has reported."""
        return [*super().get_results(implicit_materializations=implicit_materializations), *self._checks]

    def get_custom_messages(self) -> Sequence[Any]:
        """Return the custom messages of all tasks, in the order of the tasks."""
        return [message for each in self.tasks.values() for message in each.messages]


@dataclass(frozen=True, slots=True)
class CheckOutcome:
    """The outcome of an asset check in one task, or for one partition of an earlier run."""

    name: str
    passed: bool
    severity: dg.AssetCheckSeverity
    text: str


def combine_checks(
    expected: Iterable[dg.AssetCheckKey],
    results: Sequence[TaskResult],
    earlier: Mapping[dg.AssetCheckKey, Sequence[CheckOutcome]],
) -> list[dg.AssetCheckResult]:
    """Return one result for each asset check that a task has reported: passed if it has passed in every task.

    `earlier`: outcomes for partitions that an earlier run has computed.
    """
    combined = []
    for check in sorted(expected):
        reported = [each.checks[check] for each in results if check in each.checks]
        outcomes = [*earlier.get(check, ()), *(_outcome(check, each) for each in results)]
        if len(reported) == len(outcomes) == 1:
            combined.append(reported[0])
        elif reported or check in earlier:
            combined.append(_combine(check, outcomes))
    return combined


def _outcome(check: dg.AssetCheckKey, result: TaskResult) -> CheckOutcome:
    found = result.checks.get(check)
    if found is None:
        return CheckOutcome(result.task.name, passed=False, severity=dg.AssetCheckSeverity.ERROR, text="not reported")
    return CheckOutcome(result.task.name, bool(found.passed), found.severity, shorten_metadata(found))


def read_outcome(check: dg.AssetCheckKey, partition: str, stored: Mapping[str, Any]) -> CheckOutcome | None:
    """Return the outcome of a check from the metadata with which a partition was stored; None if it has none."""
    passed, details = stored.get(CHECK.format(check.name)), stored.get(CHECK_DETAILS.format(check.name))
    if not isinstance(passed, dg.BoolMetadataValue) or not isinstance(details, dg.JsonMetadataValue):
        return None
    known: Any = details.data
    severity = dg.AssetCheckSeverity(known["severity"])
    return CheckOutcome(partition, bool(passed.value), severity, known["reported"])


def _combine(check: dg.AssetCheckKey, outcomes: Sequence[CheckOutcome]) -> dg.AssetCheckResult:
    failed = [each for each in outcomes if not each.passed]
    severe = any(each.severity == dg.AssetCheckSeverity.ERROR for each in failed or outcomes)
    metadata: dict[str, Any] = {"tasks": len(outcomes), "failed": len(failed)}
    if failed:
        rows = [{"task": each.name, "severity": each.severity.value, "reported": each.text} for each in failed]
        metadata["failures"] = table(rows)
    return dg.AssetCheckResult(
        asset_key=check.asset_key,
        check_name=check.name,
        passed=not failed,
        severity=dg.AssetCheckSeverity.ERROR if severe else dg.AssetCheckSeverity.WARN,
        metadata=metadata,
    )


def table(rows: Sequence[Mapping[str, Any]]) -> dg.TableMetadataValue:
    """Return the first MOST_ROWS rows as metadata; finite numbers stay numbers, and what a row lacks is None."""
    columns: dict[str, str] = {}
    rows = [{name: in_json(value) for name, value in row.items()} for row in rows]
    for row in rows:
        for name, value in row.items():
            kind = "int" if type(value) is int else "float" if type(value) is float else "string"
            columns[name] = kind if columns.get(name, kind) == kind else "string"
    schema = dg.TableSchema([dg.TableColumn(name, kind) for name, kind in columns.items()])
    nothing = dict.fromkeys(columns)  # Dagster refuses a table whose records differ in their fields
    records = [dg.TableRecord({**nothing, **row}) for row in rows[:MOST_ROWS]]
    return dg.MetadataValue.table(records, schema)


def attempts_metadata(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the attempts at jobs as metadata; nothing without rows, which `rows_of` returns."""
    return {ATTEMPTS: table(rows)} if rows else {}


def summarize(results: Sequence[TaskResult]) -> dict[str, Any]:
    """Return metadata of an asset whose tasks are parameter sets: a table of them, and their costs together."""
    rows = []
    for each in results:
        numbers = {name: getattr(value, "value", None) for name, value in each.metadata.items()}
        shown = {name: value for name, value in numbers.items() if isinstance(value, int | float | str)}
        rows.append({"task": each.task.name, **shown, **each.costs})
    sums = {name: round(sum(each.costs[name] for each in results if name in each.costs), 6) for name in _SUMS}
    return {"tasks": table(rows), **{name: total for name, total in sums.items() if total}}
