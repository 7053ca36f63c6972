"""Hours of Slurm's resources that jobs have used, or may still use. What is not known is None."""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

from dagster_sbatch.slurm.gateway import JobLife, Queued

DIGITS, MOST_DIGITS = 2, 6  # after the point, of hours that are shown


def end_of(job: JobLife, now: datetime) -> datetime:
    """Return when a job ended; of one that is running, the time until which it counts.

    `now`: by the clock of the login node. If that clock is behind Slurm's, the run time that Slurm reports counts.
    """
    return job.end or max(now, job.start + timedelta(seconds=job.seconds))


def hours_used(job: JobLife, tres: str, since: datetime, now: datetime, until: datetime | None = None) -> float | None:
    """Return the hours of a resource that a job has used within a period; its suspensions are spread evenly."""
    count, end = job.tres.get(tres), end_of(job, now)
    whole = (end - job.start).total_seconds()
    within = (min(end, until or end) - max(job.start, since)).total_seconds()
    share = max(within, 0.0) / whole if whole > 0 else 0.0
    return None if count is None else count * job.seconds / 3600 * share


def hours_at_most(jobs: Queued, tres: str) -> float | None:
    """Return the hours of a resource that some jobs use at most from now on; None if they have no time limit."""
    count = jobs.tres.get(tres)
    if count == 0:
        return 0.0
    return None if count is None or jobs.seconds is None else jobs.count * count * jobs.seconds / 3600


def add(hours: Iterable[float | None]) -> float | None:
    """Return a sum; None if one of its parts is not known."""
    parts = list(hours)
    known = [each for each in parts if each is not None]
    return sum(known) if len(known) == len(parts) else None


def show_hours(hours: float | None, unit: str = "", *, beside: Sequence[float | None] = ()) -> str:
    """Return hours as text: as a whole number, or with two digits after the point; `?` if they are not known.

    `unit`: what follows it, in the plural: `GPU-hours`. `beside`: numbers that a reader compares it with. It has up to
    six digits after the point if it would otherwise read like one of them, or like 0, and is another number.
    """
    if hours is None:
        return f"? {unit}".rstrip()
    number = round(hours, MOST_DIGITS) + 0.0  # no -0
    others = {round(other, MOST_DIGITS) for other in (0.0, *beside) if other is not None} - {number}
    digits = 0 if number.is_integer() else DIGITS
    while digits and digits < MOST_DIGITS and any(f"{number:.{digits}f}" == f"{each:.{digits}f}" for each in others):
        digits += 1
    return f"{number:.{digits}f} {unit.removesuffix('s') if number == 1 else unit}".rstrip()
