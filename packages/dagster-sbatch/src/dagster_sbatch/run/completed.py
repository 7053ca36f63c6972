"""The partitions of an array that earlier runs have completed, and that the step need not compute again."""

from collections.abc import Callable, Mapping, Sequence

import dagster as dg

from dagster_sbatch.run.array import Task
from dagster_sbatch.run.digests import digest_of
from dagster_sbatch.run.history import CODE_VERSION, Stored, stored_partitions
from dagster_sbatch.run.step_inputs import inputs_of_step, newest_reads, with_versions
from dagster_sbatch.slurm.units import count_of

INPUTS_TAG = "dagster_sbatch/inputs"
"""Tag of a materialization that is stored before the end of its step: a digest of what has decided its data."""


class CompletedPartitions:
    """The partitions of the tasks that Dagster has stored, if they were computed from the data that a task reads now.

    At its end, the step stores them again. From then on, Dagster counts them as computed from the newest data.
    """

    def __init__(self, step: dg.OpExecutionContext, tasks: Sequence[Task]) -> None:
        """Ask Dagster what it has stored; tasks without partitions have nothing that counts."""
        self.tasks, by_partition = with_versions(step, tasks), any(task.partitions for task in tasks)
        self._inputs = digest_of(inputs_of_step(step, by_partition=True)) if by_partition else ""
        self.stores_early = _stores_early(step)  # whether a partition is stored as soon as its task has succeeded
        found = stored_partitions(step) if by_partition and self.stores_early else {}
        self._newest_reads = newest_reads(step, list(found)) if found else {}
        self._code_versions = step.assets_def.code_versions_by_key if found else {}
        known = {key: task for task in self.tasks for key in task.partitions if key in found}
        current = {key for key, task in known.items() if self._is_current(task, key, found[key])}
        self._outdated = len(known) - len(current)
        done = [bool(task.partitions) and current.issuperset(task.partitions) for task in self.tasks]
        # The materializations of the partitions of complete tasks, by asset; and the indices of the other tasks
        keys = [key for task, is_done in zip(self.tasks, done, strict=True) if is_done for key in task.partitions]
        self.stored = {key: {asset: each for asset, (_, each) in found[key].items()} for key in keys}
        self.left = [index for index, is_done in enumerate(done) if not is_done]

    def _is_current(self, task: Task, partition: str, stored: Mapping[dg.AssetKey, Stored]) -> bool:
        """Return whether the inputs of a partition are the same as when it was made.

        The end of a step stores no digest of them: then the data have to be older, and `code_version` the same.
        """
        digest = self.tags(task, partition)[INPUTS_TAG]
        for asset, (number, materialization) in stored.items():
            tags = materialization.tags or {}
            same_code = self._code_versions.get(asset) in (None, tags.get(CODE_VERSION))
            without = digest if same_code and number > self._newest_reads[partition] else ""
            if tags.get(INPUTS_TAG, without) != digest:
                return False
        return True

    def tags(self, task: Task, partition: str) -> dict[str, str]:
        """Return the tags of the materialization of a partition, by which a later run knows its inputs."""
        return {INPUTS_TAG: digest_of([self._inputs, list(task.reads.get(partition, ()))])}

    def report(self, log: Callable[[str], object]) -> None:
        """Log how many partitions are skipped, and how many are not although they are stored."""
        if self.stored:
            log(f"This run skips {count_of(len(self.stored), 'partition')} that earlier runs have completed.")
        if self._outdated:
            again = count_of(self._outdated, "partition")
            log(f"This run computes {again} again: there is newer data to read, or code_version has changed.")


def _stores_early(step: dg.OpExecutionContext) -> bool:
    """Return whether nothing is missing of a partition when its task has succeeded.

    Later ops make the partitions of a graph asset. If a function is declared to return a value, an IO manager stores
    that at the end of the step.
    """
    made_by = step.assets_def.node_def if step.has_assets_def else None
    types = [each.dagster_type for each in made_by.output_defs] if isinstance(made_by, dg.OpDefinition) else []
    return bool(types) and all(each.is_nothing or each.is_any for each in types)
