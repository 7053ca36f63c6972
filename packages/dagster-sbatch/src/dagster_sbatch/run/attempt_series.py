"""The attempts at a job, or at a task of an array, one after another: those so far, and the request of the next one."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dagster_sbatch.run.attempt_record import AttemptRecord, load_attempts
from dagster_sbatch.run.guard import within_limit
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import Allocation, SlurmRequest
from dagster_sbatch.slurm.next_request import Next, next_request
from dagster_sbatch.slurm.retries import Fault


@dataclass
class AttemptSeries:
    """The attempts at a job, or at a task of an array.

    Attributes:
        planned: the allocation of a first attempt.
        settings: with the limit of what an attempt may cost.
        ended: the attempts that are over, if there are several.
        changed: whether the asset's request has changed since an earlier run of the step submitted the job that is
            followed now.
        request: of the next attempt.
    """

    planned: Allocation
    settings: Settings
    ended: tuple[AttemptRecord, ...] = ()
    changed: bool = False
    request: SlurmRequest = field(init=False)

    def __post_init__(self) -> None:
        self.request = self.planned.request

    def read(self, record: Mapping[str, Any], request: Mapping[str, Any], task: int | None = None) -> None:
        """Read the attempts before a job that an earlier run of the step has submitted.

        Args:
            record: of the job.
            request: of the asset, as it would be stored now.
            task: the index of the task in the array job, if it is one.
        """
        self.ended = load_attempts(record if task is None else record["tasks"][task])
        self.changed = record["request"] != request

    def find_next(self, fault: Fault | None, request: SlurmRequest, node: str) -> Next:
        """Return what follows an attempt.

        Args:
            fault: why the attempt failed; None if it has not, or if that is not known.
            request: of the attempt.
            node: on which it ran; empty if that is not known.
        """
        found = next_request(fault, request, self.planned, node, len(self.ended))
        if found.request and self.changed:
            found = Next(self.planned.request, "the request of the asset, which has changed")
        return within_limit(found, self.planned, self.settings)

    def repeat(self, attempt: AttemptRecord, request: SlurmRequest) -> None:
        """Register an attempt that has failed, and the request of the next one."""
        self.ended += (attempt,)
        self.request, self.changed = request, False

    def end(self, attempt: AttemptRecord, *, succeeded: bool) -> None:
        """Register the last attempt, if there were others before it."""
        if self.ended:
            self.ended += (replace(attempt, end="succeeded") if succeeded else attempt,)
