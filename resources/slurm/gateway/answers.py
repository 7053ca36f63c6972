"""What the agent on the login node answers, and what ends a wait for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class RefusedError(Exception):
    """Slurm or the agent said no, for good; the text is theirs."""


class LostClaimError(Exception):
    """While the connection was lost, another client has become the one that acts; the text says who."""


class StoppedError(Exception):
    """The wait was ended from here; nothing is known of what was asked."""


@dataclass(frozen=True)
class Submitted:
    """A run's job.

    Attributes:
        job: its id.
        how: `submitted` now, `recorded` before, or `found` in Slurm after an answer that was lost.
    """

    job: str
    how: str


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job that is not over.

    Attributes:
        state: `PENDING`, `RUNNING`, ...
        reason: why it waits; `None` (the word) if it does not.
        start: expected start in seconds since 1970, if Slurm knows.
    """

    state: str
    reason: str
    start: float | None


@dataclass(frozen=True)
class JobEnd:
    """How a job ended.

    Attributes:
        code: exit code of the job script, by its own word; None if it was cut short.
        state: Slurm's last one; empty if Slurm does not know the job any more.
        exit: Slurm's exit code and signal, such as `0:0`; empty if not known.
        submitted, started, ended: by Slurm, in seconds since 1970; None if not known.
        cause: why it failed, by the word of something in it; empty if nothing there knows more than the code.
        short: streams of which less came than the job had written, and up to where it came.
        rows: of sacct, the job and its steps, with ACCOUNTED; empty if it did not answer in time.
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

    @classmethod
    def parse(
        cls, end: Mapping[str, Any], short: Mapping[str, int] | None = None, rows: Sequence[Sequence[str]] = ()
    ) -> "JobEnd":
        """From what the agent says."""
        submitted, started, ended = end["times"]
        cause = end.get("cause", "")
        return cls(end.get("code"), end["state"], end["exit"], submitted, started, ended, cause, short or {}, rows)


@dataclass(frozen=True)
class Claim:
    """What a family of runs has come to, and who acts on it.

    Attributes:
        held_by: who else does, in words; then nothing more is known.
        runs: the folder of all runs, as an absolute path.
        home: the user's home there.
        attempt: number of the latest attempt; 0 if there is none.
        over: whether that one is.
        end: how it ended; None if it is not over, or was never submitted.
        job: its id.
        judged: whether its result was looked at, and taken or found wanting.
    """

    held_by: str | None
    runs: str = ""
    home: str = ""
    attempt: int = 0
    over: bool = True
    end: JobEnd | None = None
    job: str | None = None
    judged: bool = False
