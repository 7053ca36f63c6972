"""Publish the environment that production runs on the supercomputer, and look after those that are there."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich import progress as bars
from rich.console import Console
from rich.table import Table

from dagster_sbatch.auth import AccessError, ensure_certificate
from dagster_sbatch.environments import (
    Comparison,
    Environments,
    EnvironmentSpec,
    LoggedProgress,
    Progress,
    read_code,
    read_lock,
    revision_of,
)
from dagster_sbatch.environments.retention import choose_for_removal
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.inspect.remote_runs import Runs
from dagster_sbatch.project import Project
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm.gateway import Gateway, RefusedError, choose_channel
from dagster_sbatch.ssh import SshError

DESCRIPTION = """\
Publish what production_supercomputer runs: the packages of requirements/cluster.txt and the workloads as git tracks
them. Packages are sent once; what is on the supercomputer is not sent again, and a broken connection is continued where
it broke. From then on, runs whose workloads or packages differ from what was published are refused.

Settings are those of a supercomputer deployment (docs/settings.md). With SLURM_PYTHON, the workloads alone are sent.
"""
EPILOG = """\
examples:
  scripts/deploy_environment.py                      publish what is here
  scripts/deploy_environment.py --check              what would be sent; nothing is changed
  scripts/deploy_environment.py --rollback           production runs what was published before, at once
  scripts/deploy_environment.py --list
  scripts/deploy_environment.py --remove --keep 3 --older-than 30

exit codes:
  0  done; with --check: what is here is what production runs
  1  with --check: it is not
  2  wrong usage, or something here is wrong: the settings, the lock, the workloads
  3  the supercomputer cannot be reached, or refused: the text says why
"""


class BarProgress:
    """A bar for a terminal: percent, size, speed, time left."""

    def __init__(self, bar: bars.Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("sending", visible=False)

    def step(self, text: str) -> None:
        """Print it above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)

    def sent(self, done: int, total: int) -> None:
        """Move the bar, which appears with the first bytes."""
        self._bar.update(self._task, completed=done, total=total, visible=True)


@contextmanager
def progress_on(console: Console) -> Iterator[Progress]:
    """A bar on a terminal, lines anywhere else."""
    if not console.is_terminal:
        yield LoggedProgress(print)
        return
    numbers = (bars.DownloadColumn(), bars.TransferSpeedColumn(), bars.TimeRemainingColumn())
    with bars.Progress(bars.TaskProgressColumn(), bars.BarColumn(), *numbers, console=console) as bar:
        yield BarProgress(bar)


def main(project: Project) -> int:
    asked = parse_arguments()
    try:
        settings = project.load_settings(supercomputer=True)
        site = project.load_site(settings.supercomputer_site)
        channel = choose_channel(
            settings, site.python_candidates, ensure_certificate, site.host_authorities, site.setup_commands
        )
        gateway = Gateway(channel, on_trouble=lambda text: print(f"{text}; trying again", file=sys.stderr))
        environments = Environments(gateway, str(settings.deployment_base_path), site)
        try:
            return act(asked, project, settings, gateway, environments)
        finally:
            gateway.close()
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 2
    except (RefusedError, AccessError, SshError) as error:
        print(error, file=sys.stderr)
        return 3


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="say what would be sent, change nothing")
    what.add_argument("--rollback", action="store_true", help="let production run what was published before")
    what.add_argument("--list", action="store_true", help="show the environments that are there")
    what.add_argument("--remove", action="store_true", help="remove old ones; never one that a job or production uses")
    parser.add_argument("--keep", type=int, metavar="N", help="with --remove: the N that were used last stay")
    parser.add_argument("--older-than", type=float, metavar="DAYS", help="with --remove: those used since then stay")
    asked = parser.parse_args()
    if asked.remove != (asked.keep is not None or asked.older_than is not None):
        parser.error("--remove goes with --keep, --older-than or both")
    return asked


def act(
    asked: argparse.Namespace, project: Project, settings: Settings, gateway: Gateway, environments: Environments
) -> int:
    if asked.rollback:
        entry = environments.roll_back()
        print(
            f"production runs {entry['name']} again; the code for it: {entry['revision'] or 'of an unknown revision'}"
        )
        return 0
    if asked.list:
        show(environments)
        return 0
    if asked.remove:
        used = Runs(gateway, settings).environments_in_use()
        names = choose_for_removal(environments.inventory(), used, keep=asked.keep, older_than=asked.older_than)
        removed = environments.remove(names)
        print(f"removed {len(removed)}: {', '.join(removed)}" if removed else "there is nothing to remove")
        return 0
    code = read_code(project.workloads)
    for note in code.notes:
        print(f"warning: {note}", file=sys.stderr)
    wanted = EnvironmentSpec(code, read_lock(project.lock), settings.python)
    return check(environments, wanted) if asked.check else publish(environments, wanted)


def publish(environments: Environments, wanted: EnvironmentSpec) -> int:
    with progress_on(Console()) as progress:
        environment = environments.ensure(wanted, progress)
    new = environments.publish(environment, revision_of(wanted.code.folder))
    how = "published" if new else "was published already"
    print(f"{how}: {environment.name}, Python {environment.interpreter.version}")
    return 0


def check(environments: Environments, wanted: EnvironmentSpec) -> int:
    with tempfile.TemporaryDirectory(prefix="wheels-") as folder, progress_on(Console()) as progress:
        found = environments.compare(wanted, Path(folder), progress)
    tell(found, wanted)
    published = environments.published()
    if published and not (differences := wanted.differences_from(published.environment)):
        print(f"production runs what is here: {published.environment.name}")
        return 0
    print("production does not run what is here" if published else "nothing has been published yet")
    for difference in differences if published else ():
        print(f"  {difference}")
    return 1


def tell(found: Comparison, wanted: EnvironmentSpec) -> None:
    """What would be sent."""
    python = found.environment.interpreter
    print(f"environment {found.environment.name} for {python.executable}, Python {python.version}")
    for wheel in found.missing:
        print(f"  {wheel.size / 1e6:8.1f} MB  {wheel.path.name}")
    code = sum(map(len, wanted.code.files.values()))
    if found.ready:
        print("  is there: nothing would be sent")
    else:
        size = sum(wheel.size for wheel in found.missing)
        print(f"  {size / 1e6:8.1f} MB in {len(found.missing)} wheels would be sent, and {code / 1e3:.1f} kB of code")


def show(environments: Environments) -> None:
    headings = ("name", "kind", "Python", "last used (UTC)", "production")
    table = Table(*headings, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in environments.inventory():
        environment = row.environment
        used = f"{row.used:%Y-%m-%d %H:%M}"
        table.add_row(environment.name, environment.kind, environment.interpreter.version, used, row.published)
    Console().print(table)
