"""Hours of Slurm's resources: what jobs have used or may still use, and a call's highest cost with its limit. Pure.

What is not known is None.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import Allocation
from dagster_sbatch.slurm.gateway import JobLife, Queued
from dagster_sbatch.slurm.units import count_of, format_time

DIGITS, MOST_DIGITS = 2, 6  # after the point, of hours that are shown
MINUTE = 60  # Slurm rounds time limits up to whole minutes (man sbatch, --time)


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

    `unit`: what follows it, in the plural: `GPU-hours`. `beside`: numbers that a reader compares it with. If two digits
    would show it like one of these or like 0, and it is another number, it has up to six.
    """
    if hours is None:
        return f"? {unit}".rstrip()
    number = round(hours, MOST_DIGITS) + 0.0  # no -0
    others = {round(other, MOST_DIGITS) for other in (0.0, *beside) if other is not None} - {number}
    digits = 0 if number.is_integer() else DIGITS
    while digits and digits < MOST_DIGITS and any(f"{number:.{digits}f}" == f"{each:.{digits}f}" for each in others):
        digits += 1
    return f"{number:.{digits}f} {unit.removesuffix('s') if number == 1 else unit}".rstrip()


@dataclass(frozen=True)
class Cost:
    """A cost in hours of whole nodes and of GPUs, as `node_hours` and `gpu_hours` of an asset's metadata count them."""

    node_hours: float
    gpu_hours: float


def highest_cost(allocation: Allocation, tasks: int = 1) -> Cost:
    """Return the cost if every job runs to its time limit, once.

    `tasks`: number of array tasks; each has the allocation.
    """
    minutes = math.ceil(allocation.request.seconds / MINUTE)
    nodes = tasks * allocation.request.nodes * minutes / 60
    return Cost(nodes, nodes * allocation.request.gpus_per_node)


def explain_excess(allocation: Allocation, tasks: int, settings: Settings) -> str | None:
    """Return why jobs are not submitted: their highest possible cost exceeds a limit per run; None if it does not.

    A limit of the request replaces the setting, in both directions.

    `tasks`: number of array tasks that would be submitted; 1 without an array.
    """
    request, cost = allocation.request, highest_cost(allocation, tasks)
    limits = [
        (cost.gpu_hours, True, "fewer GPUs or nodes",
         "most_gpu_hours", request.most_gpu_hours, "SLURM_MOST_GPU_HOURS_PER_RUN", settings.most_gpu_hours_per_run),
        (cost.node_hours, False, "fewer nodes",
         "most_node_hours", request.most_node_hours, "SLURM_MOST_NODE_HOURS_PER_RUN", settings.most_node_hours_per_run),
    ]  # fmt: skip
    for hours, gpus, less, field, own, variable, setting in limits:
        limit = setting if own is None else own
        if limit is not None and round(hours - limit, MOST_DIGITS) > 0:
            name = variable if own is None else f"{field} of the request"
            return (
                f"{describe_cost(allocation, tasks, limit, gpus=gpus)}. "
                f"{name} allows {show_hours(limit, beside=[hours])}, so nothing is submitted. "
                f"Request a shorter time_limit or {less}{', or divide the tasks' if tasks > 1 else ''}; "
                f"or allow this asset more: SlurmRequest({field}={math.ceil(hours)}, ...)"
            )
    return None


def describe_cost(allocation: Allocation, tasks: int, limit: float, *, gpus: bool) -> str:
    """Return what a call could cost, with its factors, as the beginning of a sentence.

    `limit`: what the cost exceeds; the reader can tell the two numbers apart. `gpus`: whether both are GPU-hours;
    otherwise node-hours.
    """
    request, cost = allocation.request, highest_cost(allocation, tasks)
    factors = [count_of(tasks, "task")] if tasks > 1 else []
    factors.append(count_of(request.nodes, "node"))
    factors += [count_of(request.gpus_per_node, "GPU")] if gpus else []
    product = " x ".join([*factors, format_time(request.time_limit)])
    hours, unit = (cost.gpu_hours, "GPU-hours") if gpus else (cost.node_hours, "node-hours")
    return f"This call of compute.run could cost {show_hours(hours, unit, beside=[limit])} ({product})"
