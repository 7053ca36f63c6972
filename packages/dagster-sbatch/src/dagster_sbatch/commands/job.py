"""Look at the jobs on the supercomputer, fetch what they wrote, cancel them; without ssh."""

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

from dagster_sbatch.auth import AccessError
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.inspect.dashboard import open_dashboard
from dagster_sbatch.inspect.runs import RunRecord, Runs, open_runs
from dagster_sbatch.project import Project
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm.gateway import RefusedError
from dagster_sbatch.ssh import SshError
from dagster_sbatch.upkeep.ownership import left_jobs

DESCRIPTION = """\
Look at the jobs that Dagster runs have submitted, fetch what they wrote, or cancel them. RUN_OR_JOB is a Slurm job id,
the beginning of a Dagster run's id (six characters or more), or a submission key (the job's name). Without arguments:
a table of all, and below it the jobs that no run follows, which a re-execution can attach to.
"""
EPILOG = """\
examples:
  scripts/job
  scripts/job 1184 logs
  scripts/job 3f2a9c1d state
  scripts/job 1184 fetch events
  scripts/job 1184 fetch stderr --to /tmp/stderr.txt
  scripts/job 3f2a9c1d cancel
  scripts/job 1184 dashboard

exit codes: 0 done, 1 there is no such run, or it was refused (the reason is printed), 2 wrong usage,
3 the supercomputer cannot be reached
"""
STREAMS = {"stdout": sys.stdout, "stderr": sys.stderr}
CONSOLE = Console()
PATIENCE = 90.0
"""Seconds for the supercomputer to answer."""


def main(project: Project) -> int:
    asked = arguments().parse_args()
    problem, code = "", 0
    try:
        settings = project.load_settings(supercomputer=True)
        endless = asked.follow or asked.action in ("fetch", "dashboard")
        with open_runs(settings, project, None if endless else PATIENCE) as runs:
            act(asked, project, runs, settings)
    except (ConfigurationError, RefusedError) as error:
        problem, code = str(error), 1
    except (AccessError, SshError) as error:
        problem, code = str(error), 3
    except KeyboardInterrupt:
        return 130
    if problem:
        Console(stderr=True).print(problem, markup=False, highlight=False, soft_wrap=True)
    return code


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(follow=False)
    parser.add_argument("run", nargs="?", metavar="RUN_OR_JOB", help="which; none: list all")
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    logs = actions.add_parser("logs", help="what it has written to stdout and stderr")
    logs.add_argument("--follow", action="store_true", help="and what it writes from now on, until it ends")
    fetch = actions.add_parser("fetch", help="copy a file of its run directory to this machine")
    fetch.add_argument("path", help="below the run directory, or absolute")
    fetch.add_argument("--to", type=Path, metavar="FILE", help="default: its name in this folder")
    actions.add_parser("state", help="how it stands, by Slurm")
    actions.add_parser("cancel", help="cancel it, and wait until it is gone")
    actions.add_parser("dashboard", help="open a way to its Ray dashboard, until Ctrl-C or the job's end")
    return parser


def act(asked: argparse.Namespace, project: Project, runs: Runs, settings: Settings) -> None:
    if asked.run is None:
        tell(runs.all(), runs, now=False)
        tell_left(project, runs)
    elif asked.action in (None, "state"):
        tell(runs.find(asked.run), runs, now=True)
    elif asked.action == "cancel":
        for run in runs.find(asked.run):
            end = runs.gateway.cancel(run.path)
            print(f"job {run.job}: {end.state}" if end else f"{run.key}: it had no job, and will have none")
    else:
        run = one(runs.find(asked.run), asked.run)
        if asked.action == "logs":
            show_logs(runs, run, asked.follow)
        elif asked.action == "dashboard":
            site = project.load_site(settings.supercomputer_site)
            with open_dashboard(settings, site, runs, run) as dashboard:
                print(f"{dashboard.address}\nit asks for this token: {dashboard.token}", flush=True)
                dashboard.ended.wait()
        else:
            path = asked.path if asked.path.startswith(("/", "~")) else f"{run.path}/{asked.path}"
            target = asked.to or Path(Path(asked.path).name)
            if asked.to is None and target.exists():
                raise ConfigurationError(
                    f"{target} is in this folder already, and would be overwritten. Name a file:\n"
                    f"  scripts/job {asked.run} fetch {asked.path} --to FILE"
                )
            runs.gateway.get(path, target)
            print(f"{target}: {target.stat().st_size} bytes")


def one(found: list[RunRecord], name: str) -> RunRecord:
    """The latest attempt, where all are attempts at the same work."""
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


def tell(found: list[RunRecord], runs: Runs, now: bool) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("job", "state", "asset", "Dagster run", "last heard of"):
        table.add_column(heading, overflow="fold", no_wrap=heading not in ("asset", "state"))
    for run in found:
        heard = f"{run.heard.astimezone():%m-%d %H:%M:%S}"
        asset = f"{run.about.asset} {run.about.partitions}".strip()
        table.add_row(run.job or "-", state(run, runs, now), asset, run.about.run[:8], heard)
    CONSOLE.print(table if found else "no runs yet")
    for run in found if now else ():
        CONSOLE.print(f"{run.job or '-'}: {run.path}", markup=False, highlight=False, soft_wrap=True)


def tell_left(project: Project, runs: Runs) -> None:
    """Name the jobs that no run of this project's Dagster follows."""
    os.environ.setdefault("DAGSTER_HOME", str(project.root))
    with dg.DagsterInstance.get() as instance:
        for job in left_jobs(instance, runs):
            CONSOLE.print(f"\n{job.text}", markup=False, highlight=False, soft_wrap=True)


def state(run: RunRecord, runs: Runs, now: bool) -> str:
    state, end = runs.look(run) if now else (None, run.end)
    if end:
        return f"{end.state or 'ended'} {end.exit}".strip()
    if state is None:
        return "not over" if run.job and not now else "never submitted"
    start = f", expected at {datetime.fromtimestamp(state.start, UTC):%Y-%m-%d %H:%M} UTC" if state.start else ""
    return state.state if state.reason == "None" else f"{state.state} ({state.reason}{start})"
