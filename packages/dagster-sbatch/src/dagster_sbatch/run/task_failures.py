"""The failed tasks of an array, grouped by cause, as the step's failure shows them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dagster_sbatch.run.array import Task
from dagster_sbatch.run.array_results import table
from dagster_sbatch.slurm.units import count_of, list_names

MOST_CAUSES, MOST_NAMES = 10, 12
"""Causes that a failure describes, and names of tasks that it shows for each. Its metadata has more."""


@dataclass(frozen=True)
class FailedTask:
    """A failed task."""

    index: int  # of the task
    task: Task  # the task
    cause: str  # what happened, and what to do
    stderr: str  # its last lines
    logs: str  # where its output is, in words or as a command


class TaskFailures:
    """The failed tasks so far, by cause. Only the first one of each cause keeps its last lines of stderr."""

    def __init__(self) -> None:
        self._causes: dict[str, list[FailedTask]] = {}

    def add(self, failed: FailedTask) -> bool:
        """Register a failed task; return whether its cause is a new one."""
        same = self._causes.setdefault(_kind(failed.cause, failed.task), [])
        same.append(replace(failed, stderr="") if same else failed)
        return len(same) == 1

    def __len__(self) -> int:
        return sum(map(len, self._causes.values()))

    def describe(self) -> str:
        """Return the causes, the most frequent first, each with its tasks and where the logs of the first one are."""
        causes = sorted(self._causes.values(), key=lambda cause: -len(cause))
        parts = [_describe(cause) for cause in causes[:MOST_CAUSES]]
        left = causes[MOST_CAUSES:]
        if left:
            number = sum(map(len, left))
            parts.append(f"{count_of(number, 'task')} failed for {count_of(len(left), 'other cause')}.")
        return "\n\n".join(parts)

    def metadata(self) -> Mapping[str, Any]:
        """Return the table of failed tasks."""
        rows = [
            {"task": each.task.name, "cause": each.cause.partition("\n")[0], "logs": each.logs}
            for cause in self._causes.values()
            for each in _by_index(cause)
        ]
        return {"failed_tasks": table(rows)}


def _describe(cause: Sequence[FailedTask]) -> str:
    tasks, first = _by_index(cause), cause[0]
    names = list_names([each.task.label for each in tasks], MOST_NAMES)
    text = f"{count_of(len(tasks), 'task')} ({names}): {first.cause}\nLogs: {tasks[0].logs}"
    return text + (f"\nLast lines of stderr of {first.task.label}:\n{first.stderr}" if first.stderr else "")


def _by_index(cause: Sequence[FailedTask]) -> list[FailedTask]:
    return sorted(cause, key=lambda each: each.index)


def _kind(cause: str, task: Task) -> str:
    """Return the first line of a cause without what differs between tasks: their names and all numbers."""
    line = cause.partition("\n")[0]
    for own in sorted({task.name, *task.partitions}, key=len, reverse=True):
        line = line.replace(own, "TASK") if len(own) > 1 else line
    return re.sub(r"\d+(\.\d+)?", "N", line)
