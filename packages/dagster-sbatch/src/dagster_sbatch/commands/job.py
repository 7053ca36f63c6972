"""List the jobs on the supercomputer, show their logs, fetch their files, cancel them; without ssh."""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import dagster as dg
from rich.console import Console
from rich.table import Table

from dagster_sbatch.commands.command_line import ends_with_reader, exit_code_of, make_parser
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.inspect.dashboard import open_dashboard
from dagster_sbatch.inspect.remote_runs import RunRecord, Runs, open_runs
from dagster_sbatch.project import Project
from dagster_sbatch.settings import Settings
from dagster_sbatch.upkeep.ownership import left_jobs

DESCRIPTION = """\
List the jobs that Dagster runs have submitted, show their logs, fetch their files, or cancel them. RUN_OR_JOB is a
Slurm job id, the first six or more characters of a Dagster run's id, or a submission key (the job's name). Without
arguments the command prints a table of all jobs, and below it the jobs that no run follows: a re-execution can attach
to them.
"""
EPILOG = """\
examples:
  scripts/job
  scripts/job 1184                the state of the job; `scripts/job 1184 state` is the same
  scripts/job 1184 logs
  scripts/job 1184 fetch events
  scripts/job 1184 fetch stderr --to /tmp/stderr.txt
  scripts/job 3f2a9c1d cancel
  scripts/job 1184 dashboard

exit codes: 0 done, 1 there is no such run, or the supercomputer refused (the reason is printed), 2 wrong usage,
3 the supercomputer cannot be reached
"""
STREAMS = {"stdout": sys.stdout, "stderr": sys.stderr}
PATIENCE = 90.0
"""Seconds for the supercomputer to answer."""


@ends_with_reader
def main(project: Project) -> int:
    parser = make_parser(DESCRIPTION, EPILOG)
    parser.set_defaults(follow=False)
    parser.add_argument("run", nargs="?", metavar="RUN_OR_JOB", help="the job; without it, list all")
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    logs = actions.add_parser("logs", help="print the job's stdout and stderr")
    logs.add_argument("--follow", action="store_true", help="and what it writes until it ends")
    fetch = actions.add_parser("fetch", help="copy a file of its run directory to this machine")
    fetch.add_argument("path", help="below the run directory, or absolute")
    fetch.add_argument("--to", type=Path, metavar="FILE", help="default: its name in this folder")
    actions.add_parser("state", help="ask Slurm for the job's state")
    actions.add_parser("cancel", help="cancel the job, and wait until it is gone")
    actions.add_parser("dashboard", help="forward a local port to its Ray dashboard, until Ctrl-C or the job ends")
    asked = parser.parse_args(add_action(sys.argv[1:]))
    if asked.run in actions.choices:
        parser.error(f"name a job before the action, for example: scripts/job 1184 {asked.run}")

    def command() -> int:
        settings = project.load_settings(supercomputer=True)
        endless = asked.follow or asked.action in ("fetch", "dashboard")
        with open_runs(settings, project, None if endless else PATIENCE) as runs:
            act(asked, project, runs, settings)
        return 0

    return exit_code_of(command)


def add_action(words: list[str]) -> list[str]:
    """Add the action `state` to a job that is named alone: argparse would take the job for an action."""
    return [*words, "state"] if len(words) == 1 and not words[0].startswith("-") else words


def act(asked: argparse.Namespace, project: Project, runs: Runs, settings: Settings) -> None:
    if asked.run is None:
        show_table(runs.all(), runs, now=False)
        show_left(project, runs)
    elif asked.action == "state":
        show_table(runs.find(asked.run), runs, now=True)
    elif asked.action == "cancel":
        for run in runs.find(asked.run):
            end = runs.gateway.cancel(run.path)
            print(f"job {run.job}: {end.state}" if end else f"{run.key} has no job, and will not get one")
    else:
        run = one(runs.find(asked.run), asked.run)
        if asked.action == "logs":
            show_logs(runs, run, asked.follow)
        elif asked.action == "dashboard":
            site = project.load_site(settings.supercomputer_site)
            with open_dashboard(settings, site, runs, run) as dashboard:
                print(f"{dashboard.url}\nThe page asks for this token: {dashboard.token}", flush=True)
                reason = dashboard.wait_until_gone()
            print(f"The forwarding has ended: {reason}. To see the state of the job:\n  scripts/job {run.job} state")
        else:
            path = asked.path if asked.path.startswith(("/", "~")) else f"{run.path}/{asked.path}"
            target = asked.to or Path(Path(asked.path).name)
            if asked.to is None and target.exists():
                raise ConfigurationError(
                    f"{target} is in this folder already. The command does not overwrite it. Name another file:\n"
                    f"  scripts/job {asked.run} fetch {asked.path} --to FILE"
                )
            runs.gateway.get(path, target)
            print(f"{target}: {target.stat().st_size} bytes")


def one(found: list[RunRecord], name: str) -> RunRecord:
    """Return the latest attempt, if all are attempts of the same step."""
    if len({run.family for run in found}) > 1:
        choices = "\n".join(f"  {run.job}  {run.about.asset} {run.about.partitions}" for run in found)
        raise ConfigurationError(f"{name} has several jobs; name one of them:\n{choices}")
    return found[-1]


def show_logs(runs: Runs, run: RunRecord, follow: bool) -> None:
    if follow:
        runs.gateway.follow(run.path, {name: writer(stream) for name, stream in STREAMS.items()}, lambda _: None)
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, stream in STREAMS.items():
            runs.gateway.get(f"{run.path}/{name}", Path(folder) / name)
            with (Path(folder) / name).open("rb") as file:
                shutil.copyfileobj(file, stream.buffer)
            stream.flush()


def writer(stream: TextIO) -> Callable[[bytes], None]:
    def write(data: bytes) -> None:
        stream.buffer.write(data)
        stream.flush()

    return write


def show_table(found: list[RunRecord], runs: Runs, now: bool) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("job", "state", "asset", "Dagster run", "last change"):
        table.add_column(heading, overflow="fold", no_wrap=heading not in ("asset", "state"))
    for run in found:
        heard = f"{run.heard.astimezone():%m-%d %H:%M:%S}"
        asset = f"{run.about.asset} {run.about.partitions}".strip()
        table.add_row(run.job or "-", state(run, runs, now), asset, run.about.run[:8], heard)
    Console().print(table if found else "no runs yet")
    for run in found if now else ():
        print(f"{run.job or '-'}: {run.path}")


def show_left(project: Project, runs: Runs) -> None:
    """Print the jobs that no run of this project's Dagster follows."""
    os.environ.setdefault("DAGSTER_HOME", str(project.root))
    with dg.DagsterInstance.get() as instance:
        for job in left_jobs(instance, runs):
            print(f"\n{job.text}")


def state(run: RunRecord, runs: Runs, now: bool) -> str:
    state, end = runs.state(run) if now else (None, run.end)
    if end:
        return f"{end.state or 'ended'} {end.exit}".strip()
    if state is None:
        return "not ended" if run.job and not now else "never submitted"
    start = f", expected at {datetime.fromtimestamp(state.start, UTC):%Y-%m-%d %H:%M} UTC" if state.start else ""
    return state.state if state.reason == "None" else f"{state.state} ({state.reason}{start})"
