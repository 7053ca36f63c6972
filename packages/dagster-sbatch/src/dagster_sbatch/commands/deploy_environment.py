"""Publish the environment that production runs on the supercomputer; list, roll back and remove environments."""

import argparse
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rich import progress as bars
from rich.console import Console

from dagster_sbatch.commands.command_line import entry_point, make_parser, make_trouble_printer, print_table
from dagster_sbatch.environments.code import revision_of
from dagster_sbatch.environments.deployed import EnvironmentListing, Environments, EnvironmentSpec, Progress, read_specs
from dagster_sbatch.environments.groups import DEFAULT
from dagster_sbatch.inspect.remote_runs import open_runs
from dagster_sbatch.project import Project
from dagster_sbatch.slurm.units import count_of

DESCRIPTION = """\
Publish what production_supercomputer runs: the packages of requirements/cluster.txt and of each cluster-NAME.txt (for
assets with environment="NAME"), and the workloads as git tracks them. From then on, production refuses runs whose
workloads or packages differ. All groups of packages are published at once; --rollback returns to all that were
published before. Each package is sent once. After a broken connection, sending continues where it stopped.

The settings are those of a supercomputer deployment (scripts/docs settings). With SLURM_PYTHON, the packages of
cluster.txt are not sent.
"""
EPILOG = """\
examples:
  scripts/deploy_environment.py                      publish what is here
  scripts/deploy_environment.py --check              show what would be sent; nothing is changed
  scripts/deploy_environment.py --rollback           let production run what was published before
  scripts/deploy_environment.py --list
  scripts/deploy_environment.py --remove --keep 3 --older-than 30

exit codes:
  0  done; with --check: production runs what is here
  1  with --check: production runs something else
  2  wrong usage, or something here is wrong: the settings, the lock file, the workloads
  3  the supercomputer cannot be reached or refused the request; the text says why
"""


@entry_point(wrong=2, refused=3)
def main(project: Project) -> int:
    options = _parse_arguments()
    settings = project.load_settings(supercomputer=True)
    site = project.load_site(settings.supercomputer_site)
    with open_runs(settings, project, on_trouble=make_trouble_printer()) as runs:
        environments = Environments(runs.gateway, str(settings.deployment_base_path), site)
        if options.rollback:
            return roll_back(environments)
        if options.list:
            return show(environments)
        if options.remove:
            return remove(environments, runs.environments_in_use(), options.keep, options.older_than)
        specs = read_specs(project, settings)
        for note in specs[DEFAULT].code.notes:
            print(f"warning: {note}", file=sys.stderr)
        return check(environments, specs) if options.check else publish(environments, specs)


def _parse_arguments() -> argparse.Namespace:
    parser = make_parser(DESCRIPTION, EPILOG)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="show what would be sent; change nothing")
    action.add_argument("--rollback", action="store_true", help="let production run what was published before")
    action.add_argument("--list", action="store_true", help="show all environments")
    action.add_argument("--remove", action="store_true", help="remove old ones, but none that a job or production uses")
    parser.add_argument("--keep", type=int, metavar="N", help="with --remove: keep the N that were used last")
    parser.add_argument("--older-than", type=float, metavar="DAYS", help="with --remove: keep those used since then")
    options = parser.parse_args()
    if options.remove != (options.keep is not None or options.older_than is not None):
        parser.error("--remove needs --keep, --older-than, or both")
    return options


def publish(environments: Environments, specs: Mapping[str, EnvironmentSpec]) -> int:
    """Make the environment of each group that is not there, then let production run all of them."""
    made, revision = {}, revision_of(specs[DEFAULT].code.folder)
    for group, spec in specs.items():
        with _progress_on(Console()) as progress:
            made[group] = environments.ensure(spec, progress)
    new = environments.publish(made, revision)
    how = "published" if new else "was published already"
    for group, environment in made.items():
        print(f"{how}: {environment.name}, Python {environment.interpreter.version}{_named(group)}")
    return 0


def check(environments: Environments, specs: Mapping[str, EnvironmentSpec]) -> int:
    """Print what would be sent for each group, and whether production runs what is here."""
    for group, spec in specs.items():
        _print_missing(environments, group, spec)
    different = 0
    for group, spec in specs.items():
        published = environments.published(group)
        differences = spec.differences_from(published.environment) if published else []
        if published and not differences:
            print(f"production runs what is here: {published.environment.name}{_named(group)}")
            continue
        different = 1
        said = "production does not run what is here" if published else "nothing has been published yet"
        print("\n  ".join([f"{said}{_named(group)}", *differences]))
    return different


def _print_missing(environments: Environments, group: str, spec: EnvironmentSpec) -> None:
    with tempfile.TemporaryDirectory(prefix="wheels-") as folder, _progress_on(Console()) as progress:
        found = environments.compare(spec, Path(folder), progress)
        python = found.environment.interpreter
        print(f"environment {found.environment.name} for {python.executable}, Python {python.version}{_named(group)}")
        for wheel in found.missing:
            print(f"  {wheel.size / 1e6:8.1f} MB  {wheel.path.name}")
        if found.ready:
            print("  exists: nothing would be sent")
        else:
            wheels, code = sum(wheel.size for wheel in found.missing), sum(map(len, spec.code.files.values()))
            size = f"{wheels / 1e6:8.1f} MB in {count_of(len(found.missing), 'wheel')}"
            print(f"  {size} would be sent, and {code / 1e3:.1f} kB of code")


def _named(group: str) -> str:
    return f" (environment={group!r})" if group else ""


def roll_back(environments: Environments) -> int:
    entry = environments.roll_back()
    names = ", ".join(f"{name}{_named(group)}" for group, name in entry["groups"].items())
    print(f"production runs {names} again; the code for it: {entry['revision'] or 'of an unknown revision'}")
    return 0


def show(environments: Environments) -> int:
    rows = [
        (each.name, each.kind, each.interpreter.version, f"{row.used:%Y-%m-%d %H:%M}", row.published)
        for row in environments.inventory()
        for each in [row.environment]
    ]
    print_table(("name", "kind", "Python", "last used (UTC)", "production"), rows)
    return 0


def remove(environments: Environments, used: Collection[str], keep: int | None, older_than: float | None) -> int:
    removed = environments.remove(choose_for_removal(environments.inventory(), used, keep, older_than))
    print(f"removed {len(removed)}: {', '.join(removed)}" if removed else "there is nothing to remove")
    return 0


def choose_for_removal(
    listings: Sequence[EnvironmentListing],
    used: Collection[str],
    keep: int | None = None,
    older_than: float | None = None,
) -> list[str]:
    """Return names of environments that may be removed: never one that production runs or could go back to.

    `listings`: the one used last comes first. `keep`: this many, used last, stay. `older_than`: days; those that were
    used since then stay.
    """
    limit = datetime.now(UTC) - timedelta(days=older_than or 0)
    return [
        each.environment.name
        for each in listings[keep or 0 :]
        if each.used < limit and not each.published and each.environment.name not in used
    ]


class BarProgress(Progress):
    """Progress on a terminal: a bar with percent, size, speed and time left."""

    def __init__(self, bar: bars.Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("sending", visible=False)

    def step(self, text: str) -> None:  # noqa: D102 - see Progress
        self._bar.console.print(text, markup=False, highlight=False)

    def sent(self, done: int, total: int) -> None:  # noqa: D102 - see Progress
        self._bar.update(self._task, completed=done, total=total, visible=True)


@contextmanager
def _progress_on(console: Console) -> Iterator[Progress]:
    """Show a bar on a terminal, lines anywhere else."""
    if not console.is_terminal:
        yield Progress(print)
        return
    numbers = (bars.DownloadColumn(), bars.TransferSpeedColumn(), bars.TimeRemainingColumn())
    with bars.Progress(bars.TaskProgressColumn(), bars.BarColumn(), *numbers, console=console) as bar:
        yield BarProgress(bar)
