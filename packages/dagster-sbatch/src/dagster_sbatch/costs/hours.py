"""Hours of Slurm's resources that jobs have used, or may still use. What is not known is None."""

from collections.abc import Iterable
from datetime import datetime

from dagster_sbatch.slurm.gateway import JobLife, Queued


def hours_ran(job: JobLife, since: datetime, until: datetime | None, now: datetime) -> float:
    """Return for how many hours a job ran within a period; a suspension is spread evenly over its life.

    Args:
        job: of Slurm's accounting.
        since, until: of the period; until None: the period has no end.
        now: by the clock of the login node, for a job that is running. A job that is over may have ended later by the
            clock of Slurm.
    """
    end = job.end or max(now, job.start)
    whole = (end - job.start).total_seconds()
    within = (min(end, until or end) - max(job.start, since)).total_seconds()
    return job.seconds / 3600 * max(within, 0.0) / whole if whole > 0 else 0.0


def hours_used(job: JobLife, tres: str, since: datetime, until: datetime | None, now: datetime) -> float | None:
    """Return the hours of a resource that a job has used within a period; see `hours_ran`."""
    count = job.tres.get(tres)
    return None if count is None else count * hours_ran(job, since, until, now)


def hours_at_most(jobs: Queued, tres: str) -> float | None:
    """Return the hours of a resource that some jobs use at most from now on; None if they have no time limit."""
    count = jobs.tres.get(tres)
    if count == 0:
        return 0.0
    return None if count is None or jobs.seconds is None else jobs.count * count * jobs.seconds / 3600


def add(hours: Iterable[float | None]) -> float | None:
    """Return a sum; None if one of its parts is not known."""
    total = 0.0
    for each in hours:
        if each is None:
            return None
        total += each
    return total


def show_number(number: float | None) -> str:
    """Return a number as text: two digits after the point, more if it would be 0 with them; `?` if it is not known."""
    if number is None:
        return "?"
    return f"{number:.2g}" if 0 < abs(number) < 0.01 else f"{number:.2f}"
