"""The agent's answers as data classes, and the exceptions that end a request."""

import signal
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
    """The run directory of a job that is followed was removed, so that nobody can adopt the job any more."""

    def __init__(self, text: str, run: str) -> None:
        super().__init__(text)
        self.run = run


class LostClaimError(Exception):
    """While the connection was lost, another client has claimed the runs; the text says which."""


class StoppedError(Exception):
    """`stop` was set while a request waited; its outcome is not known."""


@dataclass(frozen=True)
class Submitted:
    """A run's job."""

    job: str  # its id
    how: str  # `submitted` now, `recorded` before, or `found` in Slurm after its answer was lost


@dataclass(frozen=True)
class JobState:
    """The state of a job that is not over."""

    state: str  # `PENDING`, `RUNNING`, ...
    reason: str  # why it waits; `None` (the word) if it does not
    start: datetime | None  # when it is expected to start, if Slurm knows
    account: str = ""  # project that it is charged to; empty until Slurm has answered
    node: str = ""  # its first node; empty until the job has started
    temporary: str = ""  # folder for temporary files on that node; empty until the job has started
    # For how many seconds all its GPUs had been idle when its sampler reported that; None if it has not
    idle: float | None = None


@dataclass(frozen=True)
class JobEnd:
    """How a job ended."""

    code: int | None  # exit code that the job script has recorded; None if it was cut short
    state: str  # Slurm's last one; empty if Slurm does not know the job any more
    exit: str = ""  # Slurm's exit code and signal, such as `0:0`; empty if not known
    # submitted, started, ended: times of Slurm, in seconds since 1970; None if not known
    submitted: int | None = None
    started: int | None = None
    ended: int | None = None
    # Why it failed, as something in the job has recorded; empty if nothing knows more than the exit code
    cause: str = ""
    # Streams that did not arrive in full, with the number of bytes that arrived
    short: Mapping[str, int] = field(default_factory=dict)
    # Of sacct, the job and its steps, with ACCOUNTED; empty if sacct did not answer in time
    rows: Sequence[Sequence[str]] = ()
    account: str = ""  # project that it was charged to; empty if not known
    # What its sampler has measured (`slurm.accounting`); empty if the job was too short, or was killed
    usage: Mapping[str, Any] = field(default_factory=dict)
    node: str = ""  # the first node of its latest start; empty if not known

    @property
    def succeeded(self) -> bool:
        """Whether its script ended with 0, and Slurm calls it completed or has forgotten it."""
        return self.code == 0 and self.state in ("COMPLETED", "")

    @property
    def exit_code(self) -> int:
        """Its exit code as in `subprocess`: the shell's 128 + N, if signal N ended the workload, becomes -N."""
        code = self.code or 0
        return 128 - code if code - 128 in set(signal.Signals) else code

    @classmethod
    def parse(
        cls, end: Mapping[str, Any], short: Mapping[str, int] | None = None, rows: Sequence[Sequence[str]] = ()
    ) -> "JobEnd":
        """Read the agent's answer."""
        times = dict(zip(("submitted", "started", "ended"), end["times"], strict=True))
        same = {name: end[name] for name in ("cause", "account", "usage", "node") if end.get(name)}
        return cls(end.get("code"), end["state"], end["exit"], **times, **same, short=short or {}, rows=rows)


@dataclass(frozen=True)
class TaskStates:
    """The state of the tasks of a job that a client follows."""

    waiting: int  # tasks that have not started yet
    running: int  # tasks that have started, and have not recorded their end
    requeued: int  # tasks that have started, and wait to start again: they were preempted, or their node failed
    reason: str  # why tasks wait; `None` (the word) if none does
    start: datetime | None  # when the next one is expected to start, if Slurm knows
    account: str = ""  # project that the job is charged to; empty until Slurm has answered
    shown: str = ""  # the job's own state in the queue; empty if squeue has not shown it


@dataclass(frozen=True)
class Attempt:
    """An attempt at a call: an array job, or a single job, which has one task."""

    run: str  # its run directory
    number: int  # of the attempt
    job: str | None  # its job's id; None while sbatch has not answered, or if it was never submitted
    over: bool  # whether all of its tasks are over
    tasks: Sequence[str]  # ids of the tasks by index, as recorded; a single job has one empty id
    ends: Mapping[int, JobEnd]  # how tasks ended, by index
    started: frozenset[int] = frozenset()  # indices of the tasks that have started; some may be over
    requeued: frozenset[int] = frozenset()  # those of them that were cut short and are not over: Slurm runs them again
    # Indices of the tasks whose results a step has rejected; that of a single job (0) also if Slurm refused the job
    rejected: frozenset[int] = frozenset()
    followers: Sequence[str] = ()  # ids of the Dagster runs that submitted or adopted it
    record: Mapping[str, Any] | None = None  # what it was submitted with; None if there is no readable record

    @classmethod
    def parse(cls, said: Mapping[str, Any]) -> "Attempt":
        """Read the agent's answer."""
        same = {name: said[name] for name in ("run", "number", "job", "over", "tasks", "followers", "record")}
        ends = {int(index): JobEnd.parse(end) for index, end in said["ends"].items()}
        sets: dict[str, Any] = {name: frozenset(said[name]) for name in ("started", "requeued", "rejected")}
        return cls(**same, **sets, ends=ends)


@dataclass(frozen=True)
class OtherRun:
    """A run of the same step in another family, whose job may be waiting or running."""

    family: str  # first part of its submission key
    run: str  # its run directory
    job: str | None  # its job's id; None while sbatch has not answered
    record: Mapping[str, Any] | None  # what it was submitted with; None if there is no readable record


@dataclass(frozen=True)
class Questions:
    """What the client of a claim has to know before it submits a job."""

    related: str = ""  # beginning of the submission keys of other runs: those whose jobs may not be over are reported
    data_root: str = ""  # DATA_ROOT; the answer has its absolute path
    # A request about the environment of a new attempt; see `RunEnvironment.request`
    environment: Mapping[str, Any] | None = None
    # Ids of the step's earlier jobs. While one of them runs without a run directory, nothing is submitted
    earlier: Sequence[str] = ()


@dataclass(frozen=True)
class Claim:
    """The state of a family of runs, and who acts on it."""

    held_by: str | None  # the other client that acts on it, in words; then nothing else is known
    runs: str = ""  # the folder of all runs, as an absolute path
    data_root: str = ""  # DATA_ROOT, as an absolute path
    # The latest attempt; if the attempts are array jobs, all of them, the latest last: several can be active at once
    attempts: Sequence[Attempt] = ()
    others: Sequence[OtherRun] = ()  # further runs of the step
    # The answer to the request about the environment of a new attempt; None if it failed, or if the latest attempt is
    # not over
    environment: Mapping[str, Any] | None = None

    @classmethod
    def parse(cls, said: Mapping[str, Any]) -> "Claim":
        """Read the agent's answer."""
        if "held" in said:
            return cls(said["held"])
        same = {name: said[name] for name in ("runs", "data_root", "environment")}
        attempts, others = map(Attempt.parse, said["attempts"]), (OtherRun(**each) for each in said["others"])
        return cls(None, **same, attempts=[*attempts], others=[*others])

    @property
    def number(self) -> int:
        """The number of the latest attempt; 0 if there is none."""
        return self.attempts[-1].number if self.attempts else 0
