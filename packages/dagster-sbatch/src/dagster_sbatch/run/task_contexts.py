"""The Pipes contexts of the tasks of an array: what all have in common once, and what each has for itself."""

import json
from typing import Any

import dagster as dg

from dagster_sbatch.run.array import PARTITION_KEYS, Task


class TaskContexts:
    """Makes the context of each task: `head` and the task's `tail` are a JSON document together."""

    def __init__(self, document: str, partitions_def: dg.PartitionsDefinition | None) -> None:
        """Read what all tasks have in common.

        Args:
            document: the context of the whole step, as JSON.
            partitions_def: of the step's assets.
        """
        common = json.loads(document)
        self._partitions_def = partitions_def
        self._partition = {name: common.pop(name) for name in list(common) if name.startswith("partition_")}
        extras = common.pop("extras")
        self._keys = extras.pop(PARTITION_KEYS, None)
        self.head = f'{json.dumps(common)[:-1]}, "extras": {json.dumps(extras)[:-1]}'
        self._comma = ", " if extras else ""

    def tail(self, task: Task) -> str:
        """Return the rest of a task's context. If a name of the extras comes twice, Python's `json` reads the last."""
        extras = dict(task.values)
        if keys := list(task.partitions) or self._keys:
            extras[PARTITION_KEYS] = keys
        own = json.dumps(extras)[1:]
        fields = self._fields(task) if task.partitions else self._partition
        return f"{self._comma if extras else ''}{own}, {json.dumps(fields)[1:]}"

    def _fields(self, task: Task) -> dict[str, Any]:
        first, last = task.partitions[0], task.partitions[-1]
        window = None
        if isinstance(self._partitions_def, dg.TimeWindowPartitionsDefinition) or (
            isinstance(self._partitions_def, dg.MultiPartitionsDefinition)
            and self._partitions_def.has_time_window_dimension
        ):
            begin = self._partitions_def.time_window_for_partition_key(first).start
            end = self._partitions_def.time_window_for_partition_key(last).end
            window = {"start": begin.isoformat(), "end": end.isoformat()}
        return {
            "partition_key": first if len(task.partitions) == 1 else None,
            "partition_key_range": {"start": first, "end": last},
            "partition_time_window": window,
        }
