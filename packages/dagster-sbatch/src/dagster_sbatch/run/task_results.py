"""What the tasks of an array report, checked when each ends, and brought together at the end of the step."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import dagster as dg

from dagster_sbatch.run.array import Task
from dagster_sbatch.run.messages import MessageParser
from dagster_sbatch.run.results import PartitionReport, hand_over, partitions_of, read_partitions, report_on

MOST_ROWS = 200  # of a table in the metadata: Dagster stores it with the event
CHECK = "check {}"  # metadata of a partition: whether the asset check of that name passed for it
CHECK_DETAILS = CHECK + " details"
"""Metadata of a partition: severity of the asset check of that name, and what was reported with it, as JSON."""
LONGEST_TEXT = 200  # characters of what is kept of the metadata of a check


@dataclass(slots=True)
class TaskResult:
    """What is kept of a task that succeeded."""

    task: Task  # the task
    where: dict[str, Any]  # metadata of its job
    costs: dict[str, Any]  # numbers of its job
    reports: list[PartitionReport] = field(default_factory=list)  # on its partitions, by asset
    metadata: dict[str, Any] = field(default_factory=dict)  # what it reported of its assets as a whole
    # The outcome of each asset check that it reported
    checks: dict[dg.AssetCheckKey, "dg.AssetCheckResult"] = field(default_factory=dict)
    messages: list[Any] = field(default_factory=list)  # its own custom messages

    def of_partitions(
        self, assets: Iterable[dg.AssetKey], *, versions: bool
    ) -> dict[tuple[str, dg.AssetKey], dict[str, Any]]:
        """Return the metadata of each of its partitions, by asset; the first partition of the first has the costs.

        `versions`: whether data versions are among them: Dagster stores one per asset and step.
        """
        partitions, keys = self.task.partitions, sorted(assets)
        found: dict[tuple[str, dg.AssetKey], dict[str, Any]] = {
            (partition, key): dict(self.where) for partition in partitions for key in keys
        }
        for report in self.reports:
            entry = found.setdefault((report.partition, report.asset), {})
            entry.update(report.metadata)
            if report.data_version and versions:
                entry["data_version"] = report.data_version
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
    reader: dg.PipesMessageReader,
    task: Task,
    messages: MessageParser,
    where: dict[str, Any],
    costs: dict[str, Any],
) -> TaskResult:
    """Read what a task has reported.

    `messages`: of the task, after the last byte.
    Raises ValueError: it reported a partition of another task, an asset or a check that is not of this step, or what
    Dagster cannot read.
    """
    result = TaskResult(task, where, costs)
    handler = dg.PipesMessageHandler(context, reader)
    for message in messages.results:
        hand_over(context, message, handler.handle_message, reader)
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
    if messages.partitions:
        own = task.partitions or partitions_of(context)
        whose = "task" if task.partitions else "run"
        result.reports += read_partitions(context, reader, messages.partitions, own, whose=whose)
    return result
