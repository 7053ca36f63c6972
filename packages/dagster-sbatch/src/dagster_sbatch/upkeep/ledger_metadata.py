"""The ledger as metadata of `musica_budget`: numbers that plot, and a table of the last two weeks."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import dagster as dg

from dagster_sbatch.costs.ledger import Dimension, Entry, make_ledger, sum_by
from dagster_sbatch.inspect.job_assets import recorded_assets
from dagster_sbatch.run.array_results import table
from dagster_sbatch.slurm import Site
from dagster_sbatch.slurm.gateway import Usage

PLOT_DAYS = 7  # each number is that of this many days before the observation
TABLE = "hours_by_week"
MOST_NAMES = 10  # assets, projects or users that plot: those with the most node-hours


def ledger_metadata(usage: Usage, site: Site, instance: dg.DagsterInstance) -> dict[str, Any]:
    """Return the node-hours and GPU-hours of the jobs by asset, project and user; empty if nothing is known.

    The table has this week and the one before. What has been used in these weeks plots, under names such as
    `gpu_hours_7_days/asset/my_asset`; 0 once its jobs are older than PLOT_DAYS. Where Slurm hides the jobs of other
    users, nothing plots by project and user, because only those of this user would count.

    `usage`: with the jobs of the last two weeks.
    """
    monday = usage.now.date() - timedelta(days=usage.now.weekday() + 7)
    since = datetime.combine(monday, datetime.min.time(), usage.now.tzinfo)
    jobs = [job for job in usage.jobs or () if not job.end or job.end > since]
    usage = replace(usage, jobs=jobs)
    recorded = recorded_assets(instance, usage)
    weeks = make_ledger(usage, site, recorded, since)
    days = make_ledger(usage, site, recorded, usage.now - timedelta(days=PLOT_DAYS))
    numbers: dict[str, Any] = {}
    plotted: list[Dimension] = ["asset", "project", "user"] if usage.private is False else ["asset"]
    for dimension in plotted:
        numbers |= _numbers(weeks, days, dimension)
    return {**numbers, TABLE: table(_rows(weeks))} if weeks else {}


def _numbers(weeks: Sequence[Entry], days: Sequence[Entry], dimension: Dimension) -> dict[str, float]:
    most = sorted(sum_by(weeks, [dimension]), key=lambda each: -(each[1].node_hours or 0.0))[:MOST_NAMES]
    lately = {name: used for (name,), used in sum_by(days, [dimension])}
    found = {}
    for (name,), used in most:
        for number in ("node_hours", "gpu_hours"):
            hours = getattr(lately[name], number) if name in lately else 0.0
            if hours is not None and getattr(used, number) is not None:
                found[f"{number}_{PLOT_DAYS}_days/{dimension}/{name}"] = round(hours, 4)
    return found


def _rows(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return the sums, the last week first."""
    dimensions: list[Dimension] = ["week", "asset", "project", "user"]
    rows: list[dict[str, Any]] = []
    for values, used in sum_by(entries, dimensions):
        hours = {"node_hours": used.node_hours, "gpu_hours": used.gpu_hours, "tokens": used.tokens}
        known = {name: round(number, 4) for name, number in hours.items() if number is not None}
        named: dict[str, str] = dict(zip(dimensions, values, strict=True))
        rows.append({**named, "jobs": used.jobs, **known})
    return sorted(rows, key=lambda row: str(row["week"]), reverse=True)
