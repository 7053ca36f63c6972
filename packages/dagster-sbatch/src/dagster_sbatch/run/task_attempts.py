"""The attempts at the tasks of an array: with which request each is submitted next, and what the table shows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dagster_sbatch.run.array import Task
from dagster_sbatch.run.attempt_record import AttemptRecord, load_attempts, rows_of, store_attempts
from dagster_sbatch.run.guard import Guard
from dagster_sbatch.slurm import Allocation, SlurmRequest
from dagster_sbatch.slurm.next_request import Next, next_request
from dagster_sbatch.slurm.retries import Fault


class TaskAttempts:
    """The attempts at each task, by its index."""

    def __init__(self, planned: Allocation, guard: Guard) -> None:
        """`planned`: the allocation of first attempts."""
        self._planned, self._guard = planned, guard
        self._requests: dict[int, SlurmRequest] = {}
        self._earlier: dict[int, tuple[AttemptRecord, ...]] = {}
        self._changed: set[int] = set()

    def read(self, record: Mapping[str, Any], tasks: Mapping[int, int], request: Mapping[str, Any]) -> None:
        """Read the attempts before an array job that an earlier run of the step has submitted.

        Args:
            record: of the array job.
            tasks: indices of the tasks, by their index in the array job.
            request: of the asset, as it would be stored now.
        """
        self._earlier |= {index: load_attempts(record["tasks"][place]) for place, index in tasks.items()}
        if record["request"] != request:
            self._changed |= set(tasks.values())

    def request_of(self, index: int) -> SlurmRequest:
        """Return the request of the next attempt at a task."""
        return self._requests.get(index, self._planned.request)

    def last(self, index: int) -> AttemptRecord | None:
        """Return the last attempt at a task that was repeated; None if it was not."""
        return next(reversed(self._earlier.get(index, ())), None)

    def store(self, index: int) -> dict[str, Any]:
        """Return what the record of the next array job has of the attempts at a task."""
        return store_attempts(self._earlier.get(index, ()))

    def find_next(self, index: int, fault: Fault | None, request: SlurmRequest, node: str) -> Next:
        """Return what follows an attempt at a task.

        Args:
            index: of the task.
            fault: why the attempt failed; None if it has not, or if that is not known.
            request: of the attempt.
            node: on which it ran; empty if that is not known.
        """
        found = next_request(fault, request, self._planned, node, len(self._earlier.get(index, ())))
        if found.request and index in self._changed:
            found = Next(self._planned.request, "the request of the asset, which has changed")
        return self._guard.within_limit(found, self._planned)

    def repeat(self, index: int, attempt: AttemptRecord, request: SlurmRequest) -> None:
        """Register an attempt that has failed, and the request of the next one."""
        self._earlier[index] = (*self._earlier.get(index, ()), attempt)
        self._requests[index] = request
        self._changed.discard(index)

    def end(self, index: int, attempt: AttemptRecord, *, succeeded: bool) -> None:
        """Register the last attempt at a task."""
        if self._earlier.get(index):
            self._earlier[index] += (replace(attempt, end="succeeded") if succeeded else attempt,)

    def rows(self, tasks: Sequence[Task]) -> list[dict[str, Any]]:
        """Return the rows of a table: the attempts at the tasks that were repeated."""
        return [
            {"task": tasks[index].name, **row}
            for index, attempts in sorted(self._earlier.items())
            for row in rows_of(attempts)
        ]
