"""Show what jobs have used, and what the projects have left."""

import argparse
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, time, timedelta
from typing import get_args

from dagster_sbatch.commands.command_line import entry_point, make_parser, make_trouble_printer, print_table
from dagster_sbatch.commands.project_history import open_history
from dagster_sbatch.costs.budget import PACE_DAYS, budget_start, budgets_of, describe
from dagster_sbatch.costs.cost import show_hours
from dagster_sbatch.costs.ledger import OTHER, UNKNOWN, Dimension, Entry, make_ledger, sum_by, total
from dagster_sbatch.inspect.remote_runs import open_runs
from dagster_sbatch.project import Project
from dagster_sbatch.run.past_use import last_proposals
from dagster_sbatch.run.tags import recorded_assets

WEEKS = 8
PATIENCE = 180.0  # seconds for the supercomputer to answer: Slurm reads its database
DESCRIPTION = f"""\
Show what the jobs of your projects have used, in node-hours and GPU-hours, and what the projects have left. The numbers
come from Slurm's accounting: all jobs of your projects count, as far as Slurm shows you those of other users. A number
that Slurm does not report is left out. Below the table are requests that would have been enough for the last runs of
these assets.

{OTHER} are jobs that Dagster did not submit. {UNKNOWN} are jobs of Dagster whose asset is recorded nowhere: the site
does not store the comments of jobs, and this Dagster does not know their runs.
"""
EPILOG = """\
examples:
  scripts/costs
  scripts/costs --by week,project
  scripts/costs --by user --since 2026-10-01

exit codes: 0 done, 1 Slurm's accounting did not answer, or a setting is wrong, 2 wrong usage,
3 the supercomputer cannot be reached
"""


@entry_point()
def main(project: Project) -> int:
    parser = make_parser(DESCRIPTION, EPILOG)
    dimensions = ", ".join(get_args(Dimension))
    parser.add_argument(
        "--by", type=parse_dimensions, default=["asset"], metavar="WHAT", help=f"some of {dimensions} (default: asset)"
    )
    parser.add_argument(
        "--since", type=parse_day, metavar="YYYY-MM-DD", help=f"first day, in UTC (default: {WEEKS} weeks ago)"
    )
    asked = parser.parse_args()
    return show(project, asked.by, asked.since)


def parse_dimensions(text: str) -> list[Dimension]:
    known = {dimension: dimension for dimension in get_args(Dimension)}
    try:
        return [known[name] for name in text.split(",")]
    except KeyError as error:
        raise argparse.ArgumentTypeError(f"{error.args[0]!r} is unknown; valid are {', '.join(known)}") from None


def parse_day(text: str) -> datetime:
    try:
        return datetime.combine(datetime.fromisoformat(text).date(), time(), UTC)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a day; an example is 2026-10-01") from None


def show(project: Project, by: Sequence[Dimension], day: datetime | None) -> int:
    settings = project.load_settings(supercomputer=True)
    today = datetime.combine(datetime.now(UTC).date(), time(), UTC)
    since = day or today - timedelta(weeks=WEEKS)
    first = min(filter(None, (since, budget_start(settings), today - timedelta(days=PACE_DAYS + 1))))
    with open_runs(settings, project, PATIENCE, make_trouble_printer()) as runs:
        usage = runs.gateway.usage(first)
    for budget in budgets_of(usage, settings):
        print(describe(usage, budget), end="\n\n")
    if usage.jobs is not None:
        site = project.load_site(settings.supercomputer_site)
        with open_history(project) as history:
            recorded = recorded_assets(history, usage) if history else lambda _: None
            entries = make_ledger(usage, site, recorded, since)
            if entries:
                show_ledger(entries, by)
            else:
                print(f"No job of your projects has run since {since:%Y-%m-%d}.")
            if history:
                show_proposals(last_proposals(history, (name for entry in entries for name in entry.asset.split(", "))))
    for text in usage.trouble:
        print(f"not known: {text}")
    if usage.private:
        print("Slurm hides the jobs of other users from you: only your own jobs count.")
    return 1 if usage.jobs is None else 0


def show_ledger(entries: Sequence[Entry], by: Sequence[Dimension]) -> None:
    """Print the sums, and their sum. A column of numbers that are all unknown is left out."""
    names = {"node-hours": "node_hours", "GPU-hours": "gpu_hours", "tokens": "tokens"}
    rows = sum_by(entries, by)
    known = {head: name for head, name in names.items() if any(getattr(used, name) is not None for _, used in rows)}
    cells = [
        [*values, str(used.jobs), *(show_hours(getattr(used, name)) for name in known.values())]
        for values, used in [*rows, (["all", *[""] * (len(by) - 1)], total([entry.used for entry in entries]))]
    ]
    print_table([*by, "jobs", *known], cells, folded=by, numbers=1 + len(known))


def show_proposals(proposals: Mapping[str, tuple[str, str]]) -> None:
    if proposals:
        print("\nRequests that would have been enough for the last runs; scripts/preview ASSET explains one:")
    for asset, (used, code) in proposals.items():
        print(f"\n{asset}: {used}\n  {code}")
