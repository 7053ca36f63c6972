"""The attempts at a call, or at a task of it: the record of each job has those before it, and the run shows all.

In the record of a job, `request` is the request of the asset, and CHANGED that of the job if retries have changed it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dagster_sbatch.costs.cost import explain_excess
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import Allocation, SlurmRequest, accounting
from dagster_sbatch.slurm.gateway import JobEnd
from dagster_sbatch.slurm.outcome import Outcome, find_fault, judge
from dagster_sbatch.slurm.request import COST_LIMITS
from dagster_sbatch.slurm.retries import RETRIED_FIELDS, Next, next_request

ATTEMPTS = "attempts"  # key of a record, and name of the metadata
CHANGED = "changed_request"  # key of a record
_OF_RUN = ("retries", *COST_LIMITS)  # fields that Slurm does not see: a run uses its own, for all jobs it follows
_COSTS = ("elapsed_seconds", "node_hours", "gpu_hours")


@dataclass(frozen=True)
class AttemptRecord:
    """One attempt at a call, or at a task of it."""

    job: str  # id of its job, with the task's index if it is one
    end: str  # how it ended: `succeeded`, or why it failed
    request: Mapping[str, Any]  # of Slurm, as it is stored with the job
    costs: Mapping[str, float]  # numbers of the job; see `accounting.count`

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> "AttemptRecord":
        """Read the fields that are known here: another version of the engine may have written the record."""
        texts = {name: str(document.get(name) or "") for name in ("job", "end")}
        return cls(**texts, request=document.get("request") or {}, costs=document.get("costs") or {})

    def explain_last(self, reason: str) -> str:
        """Return why it failed, and why no other attempt follows."""
        return self.end + Next(None, reason).refusal


def store_request(request: SlurmRequest) -> dict[str, Any]:
    """Return a request as it is stored with its job: the fields of the allocation that are not the default."""
    return request.model_dump(mode="json", exclude_defaults=True, exclude={*_OF_RUN})


def store_change(request: SlurmRequest, planned: SlurmRequest) -> dict[str, Any]:
    """Return what the record of a job has of a request that retries have changed; nothing if they have not."""
    return {} if request == planned else {CHANGED: store_request(request)}


def load_request(record: Mapping[str, Any] | None, planned: SlurmRequest) -> SlurmRequest:
    """Return the request of an earlier job with the limits of this run; `planned` if its record cannot be read."""
    if not record:
        return planned
    try:
        stored = record.get(CHANGED) or record["request"]
        return SlurmRequest(**{**stored, **{name: getattr(planned, name) for name in _OF_RUN}})
    except (ConfigurationError, KeyError, TypeError):  # another version of the engine has written it
        return planned


def store_attempts(attempts: Sequence[AttemptRecord]) -> dict[str, Any]:
    """Return what the record of the next job has of the attempts before it; nothing without any."""
    return {ATTEMPTS: [asdict(each) for each in attempts]} if attempts else {}


def load_attempts(record: Mapping[str, Any] | None) -> tuple[AttemptRecord, ...]:
    """Return the attempts before a job."""
    return tuple(map(AttemptRecord.parse, (record or {}).get(ATTEMPTS, ())))


def rows_of(attempts: Sequence[AttemptRecord]) -> list[dict[str, Any]]:
    """Return the attempts as rows of a table; numbers that are not known are empty."""
    return [
        {
            "attempt": number,
            "job": each.job,
            "request": ", ".join(f"{name}={each.request[name]}" for name in RETRIED_FIELDS if name in each.request),
            "end": each.end,
            **{name: each.costs[name] for name in _COSTS if name in each.costs},
        }
        for number, each in enumerate(attempts, 1)
    ]


@dataclass
class AttemptSeries:
    """The attempts at a job, or at a task of an array."""

    planned: Allocation  # the allocation of a first attempt
    settings: Settings  # with the limit of what an attempt may cost
    ended: tuple[AttemptRecord, ...] = ()  # the attempts that are over, if there are several
    # Whether the asset's request has changed since an earlier run of the step submitted the job that is followed now
    changed: bool = False
    request: SlurmRequest = field(init=False)  # of the attempt that is followed, or submitted next

    def __post_init__(self) -> None:
        self.request = self.planned.request

    def read(self, record: Mapping[str, Any] | None, request: Mapping[str, Any], task: int) -> None:
        """Read the attempts before a job that an earlier run of the step has submitted, and the job's request.

        `request`: of the asset, as it would be stored now. `task`: the index of the task in the job.
        """
        if record:
            self.ended = load_attempts(record.get("tasks", [record])[task])
            self.changed = record.get("request") != request
            self.request = load_request(record, self.planned.request)

    def judge(self, end: JobEnd, stderr: str) -> tuple[Outcome | None, Outcome | None, Next]:
        """Return why an attempt failed, as Slurm says and as `stderr` may say, and what follows.

        None follows that alone could cost more than the limit per run.
        """
        outcome = judge(end, self.request)
        failed = find_fault(outcome, end, stderr, self.request)
        fault = failed.fault if failed else None
        found = next_request(fault, self.request, self.planned, end.node, len(self.ended))
        if found.request and self.changed:
            found = Next(self.planned.request, "the request of the asset, which has changed")
        excess = found.request and explain_excess(replace(self.planned, request=found.request), 1, self.settings)
        return outcome, failed, Next(None, excess) if excess else found

    def repeat(self, job: str, end: JobEnd, how: str, request: SlurmRequest) -> None:
        """Register an attempt that has failed, and the request of the next one; `job`, `how`: see AttemptRecord."""
        self.ended += (AttemptRecord(job, how, store_request(self.request), accounting.count(end, self.request)),)
        self.request, self.changed = request, False

    def finish(self, job: str, end: JobEnd, how: str) -> None:
        """Register the last attempt, if there were others before it."""
        if self.ended:
            self.repeat(job, end, how, self.request)
