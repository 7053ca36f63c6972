"""The ledger: hours of nodes and GPUs that jobs have used, by asset, week, project and user. Pure."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from dagster_sbatch.costs.cost import add, end_of, hours_used
from dagster_sbatch.slurm import Site
from dagster_sbatch.slurm.gateway import GPU, JobLife, Usage

Dimension = Literal["asset", "week", "project", "user"]
OTHER, UNKNOWN = "(other)", "(unknown)"
"""In place of an asset: for jobs that Dagster did not submit, and for jobs of Dagster whose asset is not recorded."""

_ASSET = re.compile(r"(?:^|,)asset=([^,]+)")
_KEY = re.compile(r"[A-Za-z0-9_-]+-[0-9a-f]{10}-[0-9a-f]{10}-\d+")
"""A submission key, which is the name of a job of Dagster."""

AssetOf = Callable[[JobLife], str | None]


@dataclass(frozen=True)
class Sum:
    """What some jobs have used. Unknown numbers are None."""

    jobs: int  # how many lives of jobs, or of tasks of array jobs; one that ran in two weeks counts in both
    node_hours: float | None  # of whole nodes, also where other jobs had the rest of a node
    gpu_hours: float | None  # None if Slurm does not account for GPUs
    tokens: float | None  # in the unit of the centre; None without a formula for the partitions of all jobs


@dataclass(frozen=True)
class Entry:
    """What the jobs of one asset, week, project and user have used."""

    asset: str  # its key, OTHER or UNKNOWN
    week: str  # ISO week in UTC, such as 2026-W48
    project: str  # that the jobs are charged to
    user: str  # who submitted them
    used: Sum  # the sum of those jobs


def find_asset(job: JobLife, recorded: AssetOf) -> str:
    """Return the asset of a job, OTHER or UNKNOWN; of several assets `a, b`.

    `job`: its comment names the asset where the site stores comments. `recorded`: returns what Dagster has recorded of
    a job that has the name of one of Dagster.
    """
    if found := _ASSET.search(job.comment):
        return found[1].replace("+", ", ")
    return recorded(job) or UNKNOWN if needs_record(job) else OTHER


def needs_record(job: JobLife) -> bool:
    """Return whether only Dagster's own records can name the asset of a job."""
    return not _ASSET.search(job.comment) and bool(_KEY.fullmatch(job.name))


def make_ledger(usage: Usage, site: Site, recorded: AssetOf, since: datetime) -> list[Entry]:
    """Return the entries of all jobs since a time, by week, then asset, project and user.

    Each life of a requeued job counts. A job that is running counts up to now.

    `recorded`: see `find_asset`.
    """
    parts: dict[tuple[str, str, str, str], list[Sum]] = defaultdict(list)
    for job in usage.jobs or ():
        asset = find_asset(job, recorded)
        for week, begin, end in _weeks(job, since, usage.now):
            nodes, gpus = (hours_used(job, tres, begin, usage.now, end) for tres in ("node", GPU))
            parts[week, asset, job.project, job.user].append(Sum(1, nodes, gpus, _tokens(job, site, nodes, gpus)))
    return [
        Entry(asset, week, project, user, total(lives)) for (week, asset, project, user), lives in sorted(parts.items())
    ]


def sum_by(entries: Iterable[Entry], dimensions: Sequence[Dimension]) -> list[tuple[list[str], Sum]]:
    """Return the values of entries in some dimensions, in their order, with the sum of all entries that have them."""
    groups: dict[tuple[str, ...], list[Sum]] = defaultdict(list)
    for entry in entries:
        groups[tuple(getattr(entry, dimension) for dimension in dimensions)].append(entry.used)
    return [(list(values), total(group)) for values, group in sorted(groups.items())]


def total(used: Sequence[Sum]) -> Sum:
    """Return the sum of what some jobs have used; of none, 0."""
    hours = (add(getattr(each, name) for each in used) for name in ("node_hours", "gpu_hours", "tokens"))
    return Sum(sum(each.jobs for each in used), *hours)


def _tokens(job: JobLife, site: Site, nodes: float | None, gpus: float | None) -> float | None:
    partition = site.partitions.get(job.partition)
    if partition is None or (partition.tokens_per_node_hour is None and partition.tokens_per_gpu_hour is None):
        return None
    rates = ((nodes, partition.tokens_per_node_hour), (gpus, partition.tokens_per_gpu_hour))
    return add(None if hours is None else hours * rate for hours, rate in rates if rate)


def _weeks(job: JobLife, since: datetime, now: datetime) -> Iterator[tuple[str, datetime, datetime]]:
    """Return the weeks in which a job ran since then, each from when it counts, to its end; a job of 0 s has one."""
    at, end = max(job.start, since), end_of(job, now)
    while at < end or at == job.start:
        monday = at.date() - timedelta(days=at.weekday())
        following = datetime.combine(monday + timedelta(days=7), datetime.min.time(), at.tzinfo)
        yield f"{at:%G-W%V}", at, following
        at = following
