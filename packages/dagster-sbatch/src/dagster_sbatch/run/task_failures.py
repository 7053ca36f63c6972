"""The failed tasks of an array, grouped by cause, as the step's failure shows them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dagster_sbatch.run.array import Task
from dagster_sbatch.run.array_results import table
from dagster_sbatch.slurm.units import count_of

MOST_CAUSES, MOST_NAMES = 10, 12
"""Causes that a failure describes, and names of tasks that it shows for each. Its metadata has more."""


@dataclass
class Cause:
    """Tasks that failed for the same reason.

    Attributes:
        first: name of the task that failed first.
        text: what happened to it, and what to do.
        stderr: its last lines.
        tasks: the failed tasks by index; for each what happened to it, in one line, and where its logs are.
    """

    first: str
    text: str
    stderr: str
    tasks: dict[int, tuple[Task, str, str]] = field(default_factory=dict)


class TaskFailures:
    """The failed tasks so far. Only the first one of each cause keeps its last lines of stderr."""

    def __init__(self) -> None:
        self._causes: dict[str, Cause] = {}

    def add(self, index: int, task: Task, cause: str, stderr: str, logs: str) -> bool:
        """Register a failed task; return whether its cause is a new one.

        Args:
            index: of the task.
            task: the task.
            cause: what happened, and what to do.
            stderr: its last lines.
            logs: where its output is, in words or as a command.
        """
        kind = _kind(cause, task)
        new = kind not in self._causes
        found = self._causes.setdefault(kind, Cause(task.label, cause, stderr))
        found.tasks[index] = task, cause.partition("\n")[0], logs
        return new

    def __len__(self) -> int:
        return sum(len(cause.tasks) for cause in self._causes.values())

    def describe(self) -> str:
        """Return the causes, the most frequent first, each with its tasks and where the logs of the first one are."""
        causes = sorted(self._causes.values(), key=lambda cause: -len(cause.tasks))
        parts = [_describe(cause) for cause in causes[:MOST_CAUSES]]
        left = causes[MOST_CAUSES:]
        if left:
            number = sum(len(cause.tasks) for cause in left)
            parts.append(f"{count_of(number, 'task')} failed for {count_of(len(left), 'other cause')}.")
        return "\n\n".join(parts)

    def metadata(self) -> Mapping[str, Any]:
        """Return the table of failed tasks."""
        rows = [
            {"task": task.name, "cause": line, "logs": logs}
            for cause in self._causes.values()
            for _, (task, line, logs) in sorted(cause.tasks.items())
        ]
        return {"failed_tasks": table(rows)}


def _describe(cause: Cause) -> str:
    tasks = [cause.tasks[index] for index in sorted(cause.tasks)]
    names, number = list_names([task.label for task, _, _ in tasks]), len(tasks)
    text = f"{count_of(number, 'task')} ({names}): {cause.text}\nLogs: {tasks[0][2]}"
    return text + (f"\nLast lines of stderr of {cause.first}:\n{cause.stderr}" if cause.stderr else "")


def list_names(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _kind(cause: str, task: Task) -> str:
    """Return the first line of a cause without what differs between tasks: their names and all numbers."""
    line = cause.partition("\n")[0]
    for own in sorted({task.name, *task.partitions}, key=len, reverse=True):
        line = line.replace(own, "TASK") if len(own) > 1 else line
    return re.sub(r"\d+(\.\d+)?", "N", line)
