"""What scripts/job does with array jobs: a table of tasks, and actions on one of them."""

import re
from collections import Counter
from collections.abc import Mapping

from dagster_sbatch.commands.command_line import print_table
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.inspect.remote_runs import ORDER, RunRecord, Runs, TaskList, TaskRecord, count_tasks
from dagster_sbatch.slurm.units import count_of

MOST_ROWS = 30
"""Of a table of tasks. A longer one has the failed tasks first, then the running ones, and numbers of the others."""
MOST_LOGS = 3  # failed tasks whose stderr `logs` shows for a whole array job
TAIL = 2000  # bytes of their stderr
_TASK = re.compile(r"(\d+)_(\d+)")


def split_task(name: str) -> tuple[str, int | None]:
    """Return the job and the index in the name of a task, as Slurm writes it (`1184_17`); other names have no index."""
    found = _TASK.fullmatch(name)
    return (found[1], int(found[2])) if found else (name, None)


def find_task(runs: Runs, run: RunRecord, index: int) -> tuple[TaskList, TaskRecord]:
    """Return the task with an index, and the tasks of its array job.

    Raises ConfigurationError: the job is no array job, or has no such task.
    """
    if not run.array:
        raise ConfigurationError(
            f"Slurm job {run.job} is not an array job, so it has no tasks. Name the job:\n  scripts/job {run.job}"
        )
    tasks = TaskList(runs, run)
    return tasks, tasks.one(index)


def show_array(runs: Runs, run: RunRecord) -> None:
    """Print the tasks of an array job: all of a short one; of a long one those that failed or run."""
    tasks = TaskList(runs, run)
    if not tasks:
        print("It has no readable list of tasks: see submitted_with.json in its run directory.")
        return
    every = tasks.records()
    counts: Mapping[str, int] = Counter(task.kind for task in every)
    shown = every
    if len(every) > MOST_ROWS:
        ranked = sorted(every, key=lambda task: ORDER.index(task.kind))
        shown = [task for task in ranked if task.kind in ("failed", "running")][:MOST_ROWS]
    show_tasks(tasks, tasks.records(task.index for task in shown))
    print(f"{count_of(len(every), 'task')}: {count_tasks(counts)}")
    print(f"To see one of them:\n  scripts/job {run.job}_{shown[0].index if shown else 0}")


def show_tasks(tasks: TaskList, shown: list[TaskRecord]) -> None:
    rows = []
    for task in shown:
        changed = f"{task.changed.astimezone():%m-%d %H:%M:%S}" if task.changed else "-"
        name = f"{tasks.run.job}_{task.index}"
        rows.append((name, task.name, task.state, task.exit or "-", task.node or "-", changed))
    if rows:
        print_table(("task", "name", "state", "exit", "node", "last change"), rows, folded=("name", "state"))
    for task in shown:
        if task.cause:
            print(f"{tasks.run.job}_{task.index}: {task.cause}")


def show_array_logs(runs: Runs, run: RunRecord, follow: bool) -> None:
    """Print the last lines of failed tasks; without any, say how to name a task."""
    if follow:
        raise ConfigurationError(
            f"Job {run.job} is an array job, and --follow shows one task. Name it, for example:\n"
            f"  scripts/job {run.job}_0 logs --follow"
        )
    tasks = TaskList(runs, run)
    failed = [task.index for task in tasks.records() if task.kind == "failed"]
    for task in tasks.records(failed[:MOST_LOGS], TAIL):
        print(f"== task {run.job}_{task.index} ({task.name}): {task.state} {task.exit}; the end of its stderr:")
        print(task.stderr.rstrip() or "(empty)")
    if len(failed) > MOST_LOGS:
        print(f"== {count_of(len(failed) - MOST_LOGS, 'more task')} failed; to list them:\n  scripts/job {run.job}")
    if not failed:
        print(f"Job {run.job} is an array job, and none of its tasks has failed.")
    print(f"To see all output of one task:\n  scripts/job {run.job}_{failed[0] if failed else 0} logs")
