"""The Pipes contexts of the tasks of an array: what all have in common once, and what each has for itself."""

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

import dagster as dg

from dagster_sbatch.run.array import PARTITION_KEYS, Task
from dagster_sbatch.run.pipes import pipes_variables


class TaskContexts:
    """Makes the context of each task: `head` and the task's `tail` are a JSON document together."""

    def __init__(self, document: str, partitions_def: dg.PartitionsDefinition | None, tasks: Iterable[Task]) -> None:
        """Read what all tasks have in common.

        `document`: the context of the whole step, as JSON.
        """
        common = json.loads(document)
        self._partitions_def = partitions_def
        self._partition = {name: common.pop(name) for name in list(common) if name.startswith("partition_")}
        extras = common.pop("extras")
        self._keys = extras.pop(PARTITION_KEYS, None)
        replaced = {name for task in tasks for name in task.values} & extras.keys()
        self._replaced = {name: extras.pop(name) for name in replaced}
        self.head = f'{json.dumps(common)[:-1]}, "extras": {json.dumps(extras)[:-1]}'
        self._comma = ", " if extras else ""

    def tail(self, task: Task) -> str:
        """Return the rest of a task's context."""
        extras = {**self._replaced, **task.values}
        if keys := list(task.partitions) or self._keys:
            extras[PARTITION_KEYS] = keys
        own = json.dumps(extras)[1:]
        fields = self._fields(task) if task.partitions else self._partition
        return f"{self._comma if extras else ''}{own}, {json.dumps(fields)[1:]}"

    def files(self, run: str, tasks: Sequence[Task]) -> dict[str, str]:
        """Return the files with the contexts of an array job; `run`: its run directory, `tasks`: those in it."""
        pipes = [" ".join(pipes_variables(f"{run}/tasks/{index}").values()) for index in range(len(tasks))]
        return {
            "context.head": self.head,
            "tasks.jsonl": "".join(f"{self.tail(task)}\n" for task in tasks),
            "tasks.pipes": "".join(f"{each}\n" for each in pipes),
        }

    def _fields(self, task: Task) -> dict[str, Any]:
        first, last = task.partitions[0], task.partitions[-1]
        window = time_window(self._partitions_def, task.partitions)
        return {
            "partition_key": first if len(task.partitions) == 1 else None,
            "partition_key_range": {"start": first, "end": last},
            "partition_time_window": window and {"start": window[0].isoformat(), "end": window[1].isoformat()},
        }


def time_window(
    definition: dg.PartitionsDefinition | None, partitions: Sequence[str]
) -> tuple[datetime, datetime] | None:
    """Return the time from the first of some partitions to the last; there is at least one.

    None if the partitions have no time, or if they have a second dimension and are not one range of time for one value
    of it.
    """
    if isinstance(definition, dg.TimeWindowPartitionsDefinition):
        first, last = (definition.time_window_for_partition_key(partitions[at]) for at in (0, -1))
        return first.start, last.end
    if not isinstance(definition, dg.MultiPartitionsDefinition) or not definition.has_time_window_dimension:
        return None
    time = definition.time_window_dimension.name
    keys = [definition.get_partition_key_from_str(partition).keys_by_dimension for partition in partitions]
    others = {value for key in keys for name, value in key.items() if name != time}
    windows = [definition.time_window_for_partition_key(partition) for partition in partitions]
    if len(others) > 1 or any(before.end != after.start for before, after in pairwise(windows)):
        return None
    return windows[0].start, windows[-1].end
