"""The agent's answers about a user's projects: limits, queue, past jobs, as data classes. Absent numbers are None."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from dagster_sbatch.errors import printable
from dagster_sbatch.slurm.units import parse_duration

GPU = "gres/gpu"

Tres = Mapping[str, int]
"""Numbers of Slurm's trackable resources by name: cpu, node, billing, gres/gpu, ...

A resource that Slurm does not account for is missing, which does not mean 0."""


def parse_tres(text: str, tracked: Sequence[str] = ()) -> Tres:
    """Read a list of trackable resources.

    `text`: as Slurm prints it. A resource with a unit, such as mem=8000M, is left out. `tracked`: what Slurm accounts
    for: there is 0 of it if the text does not name it.
    """
    named = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    return {name: int(count) for name, count in {**dict.fromkeys(tracked, "0"), **named}.items() if count.isdigit()}


@dataclass(frozen=True)
class Limits:
    """What Slurm accepts of a user."""

    array: int | None  # the most tasks of an array job (MaxArraySize); their indices are smaller. None: not known
    submit: int | None  # the most jobs in the queue at once, a task counting as a job; None: no limit is known


@dataclass(frozen=True)
class Projects:
    """The projects (Slurm's accounts) that a user may charge jobs to."""

    # The QoS that each project's jobs may have, by project; empty if the accounting does not answer
    qos: Mapping[str, frozenset[str]]
    default: str = ""  # the project of a job that names none; empty if that is not known
    exported: bool = False  # whether SBATCH_ACCOUNT of the login shell says so

    @classmethod
    def parse(cls, said: Mapping[str, Any]) -> "Projects":
        """Read the agent's answer."""
        qos: dict[str, frozenset[str]] = {}
        for _, account, names in said["rows"]:  # one for each partition, if a project has more than one
            qos[account] = qos.get(account, frozenset()) | frozenset(filter(None, names.split(",")))
        return cls(qos, said["default"], said["exported"])


def charged_project(account: str | None, default: str) -> str:
    """Return the project that a job with this account is charged to, as Slurm writes it; empty if it is not known."""
    return (account or default).lower()


@dataclass(frozen=True)
class JobLife:
    """A life of a job, or of a task of an array job, that has begun; a requeued job has several."""

    job: str  # Slurm's id; of a task, `1184_17`
    user: str  # who submitted it
    project: str  # that it is charged to
    # start, end: in UTC; no end: it is running
    start: datetime
    end: datetime | None
    seconds: float  # that it ran so far, without the time for which it was suspended
    tres: Tres  # what it has on all nodes together
    partition: str  # in which it ran
    name: str  # of the job; that of a job of this package is its submission key
    comment: str  # of the job; empty if the site does not store comments


@dataclass(frozen=True)
class Queued:
    """Some jobs or tasks that are alike, and wait or run."""

    count: int  # how many they are
    running: bool  # whether they run
    # user, project: as of a JobLife
    user: str
    project: str
    seconds: float | None  # that each of them may still run; None if it has no time limit
    tres: Tres  # what each of them has, or has requested


@dataclass(frozen=True)
class Share:
    """A limit of Slurm on what a project, or a user in it, may use (GrpTRESMins), and what is used of it."""

    project: str  # whose limit it is
    user: str  # whose within the project; empty: all users
    tres: str  # the resource that is limited, such as gres/gpu
    limit: int  # in minutes of that resource
    # In the same unit; None if Slurm does not tell. It decays where the site has a PriorityDecayHalfLife
    used: int | None
    running: int  # what the running jobs may still use, until their time limits


@dataclass(frozen=True)
class Usage:
    """What the projects of a user have used, as far as Slurm shows it to the user."""

    user: str  # on the supercomputer
    projects: Sequence[str]  # of the user; empty if the accounting did not answer
    default: str  # project of a job that names none; empty if not known
    since: datetime | None  # jobs that ended before are not in it; None if the jobs were not asked for
    now: datetime  # by the clock of the login node
    jobs: Sequence[JobLife] | None  # what has begun; None if the accounting did not answer, or was not asked
    queue: Sequence[Queued] | None  # what waits and runs; None if the controller did not answer
    shares: Sequence[Share] | None  # all limits on what may be used; None if Slurm did not tell
    parents: Mapping[str, str]  # the project above each project; empty if Slurm hides them
    private: bool | None  # whether Slurm hides the jobs of other users; None if that is not known
    trouble: Sequence[str]  # why something is None

    @classmethod
    def parse(cls, said: Mapping[str, Any], since: datetime | None) -> "Usage":
        """Read the agent's answer."""
        jobs, queue, shares, private = (said[name] for name in ("jobs", "queue", "shares", "private"))
        tracked = said["tracked"] or ()
        return cls(
            **{name: said[name] for name in ("user", "projects", "default", "trouble")},
            since=since,
            now=datetime.fromtimestamp(said["now"], UTC),
            jobs=None if jobs is None else [life for row in jobs if (life := _life(row, tracked))],
            queue=None if queue is None else [_queued(row, tracked) for row in queue],
            shares=None if shares is None else _shares(shares),
            parents=said["parents"] or {},
            private=None if private is None else "jobs" in private,
        )


def _life(row: Sequence[str], tracked: Sequence[str]) -> JobLife | None:
    """Read a row; None if that is not possible: another user's job can have a name that looks like further rows."""
    job, _, user, project, start, end, seconds, text, partition, name, comment = map(printable, row)
    with suppress(ValueError, OverflowError, OSError):
        if not seconds.lstrip("-").isdigit():  # a damaged row of the accounting: it ran for all of that time
            seconds = str(int(end) - int(start)) if end.isdigit() else "0"
        begun = datetime.fromtimestamp(int(start), UTC)
        ended = datetime.fromtimestamp(int(end), UTC) if end.isdigit() else None
        ran, tres = max(float(seconds), 0.0), parse_tres(text, tracked)
        return JobLife(job, user, project, begun, ended, ran, tres, partition, name, comment)
    return None


def _queued(row: Sequence[Any], tracked: Sequence[str]) -> Queued:
    count, state, user, project, left, limit, text = row
    seconds = parse_duration(left)
    if seconds is None and parse_duration(limit) is not None:  # INVALID: past its limit, Slurm is about to end it
        seconds = 0
    return Queued(count, state != "PENDING", user, project, seconds, parse_tres(text, tracked))


def _shares(rows: Sequence[Sequence[str]]) -> list[Share]:
    found = []
    for project, user, *texts in rows:
        limits, used, running = map(parse_tres, texts)
        found += [
            Share(project, user, tres, limit, used.get(tres), running.get(tres, 0)) for tres, limit in limits.items()
        ]
    return found
