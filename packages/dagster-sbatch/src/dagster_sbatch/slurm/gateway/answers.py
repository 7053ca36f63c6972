"""The agent's answers as data classes, and the exceptions that end a request."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

ACCOUNTED = ("JobID", "State", "MaxRSS", "TotalCPU")
"""The fields of sacct: a row for the job, then one for each of its steps."""


def read_start(text: str) -> datetime | None:
    """Read the expected start of a job, as squeue writes it; None if Slurm does not know."""
    return datetime.fromtimestamp(int(text), UTC) if text.isdecimal() else None


class RefusedError(Exception):
    """Slurm or the agent refused a request: a permanent error, with their text."""


class RemovedError(RefusedError):
    """The run directory of a job that is followed was removed, so that nobody can adopt the job any more.

    Attributes:
        run: the run directory.
    """

    def __init__(self, text: str, run: str) -> None:
        super().__init__(text)
        self.run = run


class LostClaimError(Exception):
    """While the connection was lost, another client has claimed the runs; the text says which."""


class StoppedError(Exception):
    """`stop` was set while a request waited; its outcome is not known."""


@dataclass(frozen=True)
class Submitted:
    """A run's job.

    Attributes:
        job: its id.
        how: `submitted` now, `recorded` before, or `found` in Slurm after its answer was lost.
    """

    job: str
    how: str


@dataclass(frozen=True)
class JobState:
    """The state of a job that is not over.

    Attributes:
        state: `PENDING`, `RUNNING`, ...
        reason: why it waits; `None` (the word) if it does not.
        start: when it is expected to start, if Slurm knows.
        account: project that it is charged to; empty until Slurm has answered.
        node: its first node; empty until the job has started.
        temporary: folder for temporary files on that node; empty until the job has started.
        idle: for how many seconds all its GPUs had been idle when its sampler reported that; None if it has not.
    """

    state: str
    reason: str
    start: datetime | None
    account: str = ""
    node: str = ""
    temporary: str = ""
    idle: float | None = None


@dataclass(frozen=True)
class JobEnd:
    """How a job ended.

    Attributes:
        code: exit code that the job script has recorded; None if it was cut short.
        state: Slurm's last one; empty if Slurm does not know the job any more.
        exit: Slurm's exit code and signal, such as `0:0`; empty if not known.
        submitted, started, ended: times of Slurm, in seconds since 1970; None if not known.
        cause: why it failed, as something in the job has recorded; empty if nothing knows more than the exit code.
        short: streams that did not arrive in full, with the number of bytes that arrived.
        rows: of sacct, the job and its steps, with ACCOUNTED; empty if sacct did not answer in time.
        account: project that it was charged to; empty if not known.
        usage: what its sampler has measured (`slurm.job_usage`); empty if the job was too short, or was killed.
        node: the first node of its latest start; empty if not known.
    """

    code: int | None
    state: str
    exit: str = ""
    submitted: int | None = None
    started: int | None = None
    ended: int | None = None
    cause: str = ""
    short: Mapping[str, int] = field(default_factory=dict)
    rows: Sequence[Sequence[str]] = ()
    account: str = ""
    usage: Mapping[str, Any] = field(default_factory=dict)
    node: str = ""

    @property
    def succeeded(self) -> bool:
        """Whether its script ended with 0, and Slurm says nothing else."""
        return self.code == 0 and self.state in ("COMPLETED", "")

    @classmethod
    def parse(
        cls, end: Mapping[str, Any], short: Mapping[str, int] | None = None, rows: Sequence[Sequence[str]] = ()
    ) -> "JobEnd":
        """Read the agent's answer."""
        submitted, started, ended = end["times"]
        return cls(
            code=end.get("code"),
            state=end["state"],
            exit=end["exit"],
            submitted=submitted,
            started=started,
            ended=ended,
            cause=end.get("cause", ""),
            short=short or {},
            rows=rows,
            account=end.get("account") or "",
            usage=end.get("usage") or {},
            node=end.get("node", ""),
        )


@dataclass(frozen=True)
class ArrayState:
    """The state of the tasks of an array job that a client follows.

    Attributes:
        waiting: tasks that have not started yet.
        running: tasks that have, and have not recorded their end.
        requeued: tasks that have started, and wait to start again: they were preempted, or their node failed.
        reason: why tasks wait; `None` (the word) if none does.
        start: when the next one is expected to start, if Slurm knows.
        account: project that the job is charged to; empty until Slurm has answered.
    """

    waiting: int
    running: int
    requeued: int
    reason: str
    start: datetime | None
    account: str = ""


@dataclass(frozen=True)
class ArrayJob:
    """An attempt that is an array job.

    Attributes:
        run: its run directory.
        number: of the attempt.
        job: its job's id; None while sbatch has not answered, or if it was never submitted.
        over: whether all of its tasks are.
        tasks: the tasks' ids by index, of the record.
        ends: how tasks ended, by index.
        started: indices of the tasks that have started, also of those that are over.
        requeued: those of them that were cut short and are not over: Slurm runs them again.
        rejected: indices of the tasks whose results a step has rejected.
        followers: ids of the Dagster runs that submitted or adopted it.
        record: what it was submitted with; None if there is no readable record.
    """

    run: str
    number: int
    job: str | None
    over: bool
    tasks: Sequence[str]
    ends: Mapping[int, JobEnd]
    started: frozenset[int] = frozenset()
    requeued: frozenset[int] = frozenset()
    rejected: frozenset[int] = frozenset()
    followers: Sequence[str] = ()
    record: Mapping[str, Any] | None = None

    @classmethod
    def parse(cls, said: Mapping[str, Any]) -> "ArrayJob":
        """Read the agent's answer."""
        same = {name: said[name] for name in ("run", "number", "job", "over", "tasks", "followers", "record")}
        ends = {int(index): JobEnd.parse(end) for index, end in said["ends"].items()}
        sets: dict[str, Any] = {name: frozenset(said[name]) for name in ("started", "requeued", "rejected")}
        return cls(**same, **sets, ends=ends)


@dataclass(frozen=True)
class OtherRun:
    """A run of the same step in another family, whose job may be waiting or running.

    Attributes:
        family: first part of its submission key.
        run: its run directory.
        job: its job's id; None while sbatch has not answered.
        record: what it was submitted with; None if there is no readable record.
    """

    family: str
    run: str
    job: str | None
    record: Mapping[str, Any] | None


@dataclass(frozen=True)
class Questions:
    """What the client of a claim has to know before it submits a job.

    Attributes:
        related: beginning of the submission keys of other runs; they are reported if their jobs may not be over.
        data_root: DATA_ROOT; the answer has its absolute path.
        environment: a request about the environment of a new attempt; see `RunEnvironment.request`.
    """

    related: str = ""
    data_root: str = ""
    environment: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Claim:
    """The state of a family of runs, and who acts on it.

    Attributes:
        held_by: the other client that does, in words; then nothing else is known.
        runs: the folder of all runs, as an absolute path.
        data_root: DATA_ROOT, as an absolute path.
        attempt: number of the latest attempt; 0 if there is none.
        over: whether that attempt is over.
        end: how it ended; None if it is not over, or was never submitted.
        job: its id.
        rejected: whether a step has rejected its result, or Slurm has refused it.
        followers: ids of the Dagster runs that submitted or adopted it.
        record: what it was submitted with.
        others: further runs of the step.
        arrays: the attempts that are array jobs, the latest last; several can be active at once.
        environment: the answer to the request about the environment of a new attempt; None if it failed, or if the
            latest attempt is not over.
    """

    held_by: str | None
    runs: str = ""
    data_root: str = ""
    attempt: int = 0
    over: bool = True
    end: JobEnd | None = None
    job: str | None = None
    rejected: bool = False
    followers: Sequence[str] = ()
    record: Mapping[str, Any] | None = None
    others: Sequence[OtherRun] = ()
    arrays: Sequence[ArrayJob] = ()
    environment: Mapping[str, Any] | None = None

    @classmethod
    def parse(cls, said: Mapping[str, Any]) -> "Claim":
        """Read the agent's answer."""
        if "held" in said:
            return cls(said["held"])
        end = JobEnd.parse(said["end"]) if said["end"] else None
        others = [OtherRun(**each) for each in said["others"]]
        same = {name: said[name] for name in ("runs", "data_root", "attempt", "over", "job")}
        seen = {name: said[name] for name in ("rejected", "followers", "record", "environment")}
        arrays = [ArrayJob.parse(each) for each in said["arrays"]]
        return cls(None, **same, **seen, end=end, others=others, arrays=arrays)
