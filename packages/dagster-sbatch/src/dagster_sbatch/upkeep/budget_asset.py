"""The budgets of the projects in Dagster's UI: an observed asset whose numbers plot, and a check that warns in time."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg

from dagster_sbatch.costs.budget import PACE_DAYS, Budget, budget_start, budgets_of, days_left, describe, pace_of
from dagster_sbatch.costs.ledger import Dimension, Entry, make_ledger, sum_by
from dagster_sbatch.inspect.remote_runs import open_runs
from dagster_sbatch.project import Project
from dagster_sbatch.run.array_results import table
from dagster_sbatch.run.reports import markdown
from dagster_sbatch.run.tags import recorded_assets
from dagster_sbatch.slurm import Site
from dagster_sbatch.slurm.gateway import Usage
from dagster_sbatch.upkeep import NO_ACCESS, TICK_SECONDS, running_on_supercomputer, wait_for_access

OBSERVE_EVERY = 3600
SHORTEST_DAYS = 14  # a budget that lasts for fewer days fails the check

MUSICA_BUDGET = dg.AssetSpec(
    "musica_budget",
    group_name="access",
    kinds={"slurm"},
    owners=["team:platform"],
    description="What your projects on the supercomputer have used and have left, by Slurm's accounting. Each "
    "observation adds numbers, which plot.",
)


def make_budget_check(project: Project) -> dg.AssetChecksDefinition:
    """Make the check that fails when a budget lasts for less than SHORTEST_DAYS days."""

    @dg.asset_check(
        asset=MUSICA_BUDGET.key,
        name="budget_lasts",
        description=f"Whether each budget lasts for {SHORTEST_DAYS} days at the pace of the last {PACE_DAYS}. "
        "A run of this check asks Slurm, and records the numbers.",
    )
    def budget_lasts(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        try:
            usage, budgets, metadata = _ask(project, context.instance)
        except NO_ACCESS as error:
            return dg.AssetCheckResult(passed=False, severity=dg.AssetCheckSeverity.WARN, description=str(error))
        passed, text = _judge(usage, budgets)
        for observation in _observe(text, metadata):
            context.op_execution_context.log_event(observation)
        if not budgets and usage.shares is None:
            return dg.AssetCheckResult(passed=False, severity=dg.AssetCheckSeverity.WARN, description=text)
        return dg.AssetCheckResult(passed=passed, description=text)

    return budget_lasts


def make_budget_sensor(project: Project) -> dg.SensorDefinition:
    """Make the sensor that observes `musica_budget`."""

    @dg.sensor(
        name="observe_budget",
        minimum_interval_seconds=OBSERVE_EVERY,
        default_status=running_on_supercomputer(project),
        description="Asks Slurm once per hour what the projects have used and have left, over one connection, and "
        "records it at musica_budget.",
    )
    def observe_budget(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        if reason := wait_for_access(project.load_settings(supercomputer=True)):
            return dg.SensorResult(skip_reason=reason)
        try:
            usage, budgets, metadata = _ask(project, context.instance)
        except NO_ACCESS as error:
            return dg.SensorResult(skip_reason=str(error))
        passed, text = _judge(usage, budgets)
        events: list[Any] = _observe(text, metadata)
        if budgets:
            events.append(
                dg.AssetCheckEvaluation(
                    asset_key=MUSICA_BUDGET.key, check_name="budget_lasts", passed=passed, description=text, metadata={}
                )
            )
        return dg.SensorResult(skip_reason=text, asset_events=events)

    return observe_budget


def _ask(project: Project, instance: dg.DagsterInstance) -> tuple[Usage, list[Budget], dict[str, Any]]:
    """Return Slurm's answer, the budgets, and the metadata of an observation."""
    settings = project.load_settings(supercomputer=True)
    since = datetime.now(UTC) - timedelta(days=PACE_DAYS + 1)
    with open_runs(settings, project, TICK_SECONDS) as runs:
        usage = runs.gateway.usage(min(since, budget_start(settings) or since))
    budgets, site = budgets_of(usage, settings), project.load_site(settings.supercomputer_site)
    return usage, budgets, {**_numbers(usage, budgets), **ledger_metadata(usage, site, instance)}


def _judge(usage: Usage, budgets: Sequence[Budget]) -> tuple[bool, str]:
    """Return whether no budget ends soon, and a text on all; a budget that is not known is not a failure."""
    days = [days_left(usage, budget) for budget in budgets]
    passed = all(each is None or each >= SHORTEST_DAYS for each in days)
    none = "Slurm limits no project of yours, and SLURM_BUDGET_GPU_HOURS is not set."
    if usage.shares is None:
        none = "Slurm has not said whether it limits your projects, and SLURM_BUDGET_GPU_HOURS is not set."
    known = [describe(usage, budget) for budget in budgets] or [none]
    return passed, markdown("\n".join([*known, *(f"Not known: {text}" for text in usage.trouble)]))


def _observe(text: str, metadata: dict[str, Any]) -> list[dg.AssetObservation]:
    """Return the observation of `musica_budget`; none if no number is known."""
    return [dg.AssetObservation(MUSICA_BUDGET.key, description=text, metadata=metadata)] if metadata else []


def _numbers(usage: Usage, budgets: Sequence[Budget]) -> dict[str, float]:
    """Return the numbers that are known, each under the names of project, unit and number, as p70600_gpu_hours_left."""
    found: dict[str, float | None] = {}
    for budget in budgets:
        parts = [budget.project, budget.unit, "own" if budget.user else ""]
        parts += ["in", budget.limited] if budget.limited != budget.project else []
        name = re.sub(r"[^a-z0-9]+", "_", " ".join(filter(None, parts)).lower())
        days = days_left(usage, budget)
        found |= {
            f"{name}_used": budget.used,
            f"{name}_left": budget.left,
            f"{name}_per_day": pace_of(usage, budget),
            f"{name}_days_left": None if days is None or math.isinf(days) else days,
        }
    return {name: round(number, 4) for name, number in found.items() if number is not None}


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
        numbers |= _numbers_by(weeks, days, dimension)
    return {**numbers, TABLE: table(_rows(weeks))} if weeks else {}


def _numbers_by(weeks: Sequence[Entry], days: Sequence[Entry], dimension: Dimension) -> dict[str, float]:
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
        known = {name: round(number, 4) for name, number in asdict(used).items() if number is not None}
        rows.append({**dict[str, str](zip(dimensions, values, strict=True)), **known})
    return sorted(rows, key=lambda row: str(row["week"]), reverse=True)
