"""List the jobs on the supercomputer, show their logs, fetch their files, cancel them; without ssh."""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TextIO

from dagster_sbatch.commands.command_line import entry_point, make_parser, make_trouble_printer, print_table
from dagster_sbatch.commands.job_tasks import find_task, show_array, show_array_logs, show_tasks, split_task
from dagster_sbatch.commands.project_history import open_instance
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.inspect.dashboard import open_dashboard
from dagster_sbatch.inspect.remote_runs import RunRecord, Runs, TaskList, TaskRecord, count_tasks, open_runs
from dagster_sbatch.project import Project
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import Site
from dagster_sbatch.slurm.gateway import JobEnd, RefusedError, fetch_file
from dagster_sbatch.upkeep.ownership import left_jobs

DESCRIPTION = """\
List the jobs that Dagster runs have submitted, show their logs, fetch their files, or cancel them. RUN_OR_JOB is a
Slurm job id, a task of an array job (1184_17), the first six or more characters of a Dagster run's id, or the name of a
run directory. Without arguments the command prints a table of all jobs, and below it the jobs that no run follows: a
re-execution can attach to them.
"""
EPILOG = """\
examples:
  scripts/job
  scripts/job 1184                the state of the job, and of its tasks if it is an array job
  scripts/job 1184 logs
  scripts/job 1184 logs --follow  and what the job writes until it ends
  scripts/job 3f2a9c1d
  scripts/job 1184 fetch events
  scripts/job 1184 fetch stderr --to /tmp/stderr.txt
  scripts/job 3f2a9c1d cancel
  scripts/job 1184 dashboard
  scripts/job 1184_17 logs        of one task of an array job

exit codes: 0 done, 1 there is no such run, or the supercomputer refused (the reason is printed), 2 wrong usage,
3 the supercomputer cannot be reached
"""
STREAMS = {"stdout": sys.stdout, "stderr": sys.stderr}
PATIENCE = 90.0  # seconds for the supercomputer to answer


@entry_point()
def main(project: Project) -> int:
    parser = make_parser(DESCRIPTION, EPILOG)
    parser.set_defaults(follow=False)
    parser.add_argument("run", nargs="?", metavar="RUN_OR_JOB", help="the job; without it, list all")
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    logs = actions.add_parser("logs", help="print the job's stdout and stderr")
    logs.add_argument("--follow", action="store_true", help="and what it writes until it ends")
    fetch = actions.add_parser("fetch", help="copy a file of its run directory to this machine")
    fetch.add_argument("path", help="below the run directory, or absolute")
    fetch.add_argument("--to", type=Path, metavar="FILE", help="file or folder; default: its name in this folder")
    actions.add_parser("state", help="ask Slurm for the job's state")
    actions.add_parser("cancel", help="cancel the job, and wait until it is gone")
    actions.add_parser("dashboard", help="forward a local port to its Ray dashboard, until Ctrl-C or the job ends")
    words = sys.argv[1:]
    if words and words[0] in actions.choices:
        parser.error(f"name a job before the action, for example: scripts/job 1184 {words[0]}")
    alone = len(words) == 1 and not words[0].startswith("-")  # argparse would take the job for an action
    asked = parser.parse_args([*words, "state"] if alone else words)
    settings = project.load_settings(supercomputer=True)
    endless = asked.follow or asked.action in ("fetch", "dashboard")
    with open_runs(settings, project, None if endless else PATIENCE, make_trouble_printer()) as runs:
        act(asked, project, runs, settings)
    return 0


def act(asked: argparse.Namespace, project: Project, runs: Runs, settings: Settings) -> None:
    if asked.run is None:
        show_table(runs.all(), runs, now=False)
        show_left(project, runs)
        return
    name, index = split_task(asked.run)
    found = runs.find(name)
    if index is not None:
        act_on_task(asked, runs, *find_task(runs, found[-1], index))
    elif asked.action == "state":
        show_table(found, runs, now=True)
        for run in found:
            if run.array and run.job:
                show_array(runs, run)
    elif asked.action == "cancel":
        cancel(runs, found)
    else:
        act_on_job(asked, runs, one(found, name), project.load_site(settings.supercomputer_site), settings)


def cancel(runs: Runs, found: list[RunRecord]) -> None:
    """Cancel the jobs of some runs; raise RefusedError if some are not over."""
    errors, by_path = [], {run.path: run for run in found}

    def report(path: str, outcome: JobEnd | RefusedError | None) -> None:
        run = by_path[path]
        if isinstance(outcome, RefusedError):
            errors.append(str(outcome))
        else:
            print(f"job {run.job}: {outcome.state}" if outcome else f"{run.key} has no job, and will not get one")

    runs.gateway.cancel_all(list(by_path), report)
    if errors:
        raise RefusedError("\n".join(errors))


def act_on_job(asked: argparse.Namespace, runs: Runs, run: RunRecord, site: Site, settings: Settings) -> None:
    if asked.action == "fetch":
        path = asked.path if asked.path.startswith(("/", "~")) else f"{run.path}/{asked.path}"
        fetch(runs, path, asked)
    elif asked.action == "logs" and run.array:
        show_array_logs(runs, run, asked.follow)
    elif asked.action == "logs" and asked.follow:
        follow_logs(runs, run)
    elif asked.action == "logs":
        show_logs(runs, {name: f"{run.path}/{name}" for name in STREAMS})
    else:
        with open_dashboard(settings, site, runs, run) as dashboard:
            print(f"{dashboard.url}\nThe page asks for this token: {dashboard.token}", flush=True)
            reason = dashboard.wait_until_gone()
        print(f"The forwarding has ended: {reason}. To see the state of the job:\n  scripts/job {run.job} state")


def act_on_task(asked: argparse.Namespace, runs: Runs, tasks: TaskList, task: TaskRecord) -> None:
    name = f"{tasks.run.job}_{task.index}"
    if asked.action == "state":
        show_tasks(tasks, [task])
        print(f"{name}: {tasks.path(task.index, '')}")
    elif asked.action == "cancel":
        print(f"task {name}: {runs.cancel_task(tasks.run, task.index).state}")
    elif asked.action == "dashboard":
        raise ConfigurationError(f"Task {name} has no Ray dashboard, because RayLauncher does not run in arrays.")
    elif asked.action == "fetch":
        fetch(runs, tasks.path(task.index, asked.path), asked)
    elif asked.follow:
        follow_logs(runs, tasks.run, task.index)
    elif not task.node:
        raise ConfigurationError(
            f"Task {name} ({task.name}) has no output, because it has not started: it is {task.state}."
        )
    else:
        show_logs(runs, {name: tasks.path(task.index, name) for name in STREAMS})


def fetch(runs: Runs, path: str, asked: argparse.Namespace) -> None:
    target = asked.to or Path()
    if target.is_dir():
        target /= Path(path).name
    if asked.to != target and target.exists():
        raise ConfigurationError(
            f"{target} is there already. The command does not overwrite it. Name another file:\n"
            f"  scripts/job {asked.run} fetch {asked.path} --to FILE"
        )
    try:
        fetch_file(runs.gateway, path, target)
    except OSError as error:
        raise ConfigurationError(
            f"{target} cannot be written: {error.strerror}. Name another place with --to."
        ) from None
    print(f"{target}: {target.stat().st_size} bytes")


def one(found: list[RunRecord], name: str) -> RunRecord:
    """Return the latest of some attempts at the same step; refuse array jobs: several of them can be active at once."""
    if len({run.family for run in found}) > 1 or (len(found) > 1 and found[-1].array):
        choices = "\n".join(f"  {run.job}  {run.about.asset} {run.about.partitions}" for run in found)
        raise ConfigurationError(f"{name} has several jobs. Name one of them:\n{choices}")
    return found[-1]


def show_logs(runs: Runs, paths: Mapping[str, str]) -> None:
    """Print files of the supercomputer to the streams of STREAMS, and say so if all are empty."""
    size = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, path in paths.items():
            fetch_file(runs.gateway, path, Path(folder) / name)
            size += (Path(folder) / name).stat().st_size
            with (Path(folder) / name).open("rb") as file:
                shutil.copyfileobj(file, STREAMS[name].buffer)
            STREAMS[name].flush()
    if not size:
        print(f"Nothing was written to {' and '.join(paths)}.", file=sys.stderr)


def follow_logs(runs: Runs, run: RunRecord, task: int = 0) -> None:
    """Print what a job, or a task of an array job, writes until it ends."""

    def write(stream: TextIO, data: bytes) -> None:
        stream.buffer.write(data)
        stream.flush()

    sinks = {name: partial(write, stream) for name, stream in STREAMS.items()}
    runs.gateway.run(run.path, None, sinks, follower="", task=task)


def show_table(found: list[RunRecord], runs: Runs, now: bool) -> None:
    counts = {} if now else runs.task_counts(found)
    rows = []
    for run in found:
        changed = f"{run.changed.astimezone():%m-%d %H:%M:%S}"
        asset = f"{run.about.asset} {run.about.partitions}".strip()
        count = counts.get(run.path)
        shown = count_tasks(count) if count and run.job and not now else state(run, runs, now)
        rows.append((run.job or "-", shown, asset, run.followers[-1][:8], changed))
    if found:
        print_table(("job", "state", "asset", "Dagster run", "last change"), rows, folded=("state", "asset"))
    else:
        print("no runs yet")
    for run in found if now else ():
        print(f"{run.job or '-'}: {run.path}")


def show_left(project: Project, runs: Runs) -> None:
    """Print the jobs that no run of this project's Dagster follows."""
    with open_instance(project) as instance:
        for text in left_jobs(instance, runs):
            print(f"\n{text}")


def state(run: RunRecord, runs: Runs, now: bool) -> str:
    state, end = runs.gateway.state(run.path) if now else (None, run.end)
    if end:
        return f"{end.state or 'ended'} {end.exit}".strip()
    if state is None:
        return "not ended" if run.job and not now else "never submitted"
    start = f", expected at {state.start:%Y-%m-%d %H:%M} UTC" if state.start else ""
    return state.state if state.reason == "None" else f"{state.state} ({state.reason}{start})"
