"""Run directories that nobody needs any more: a sensor removes them."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial

import dagster as dg

from dagster_sbatch.inspect.remote_runs import RunRecord, TaskList, open_runs
from dagster_sbatch.project import Project
from dagster_sbatch.run.history import is_stored, stored_before
from dagster_sbatch.upkeep import NO_ACCESS, TICK_SECONDS, running_on_supercomputer, wait_for_access

CLEAN_EVERY = 6 * 3600
KEEP_DAYS, KEEP_FAILED_DAYS = 14, 90
"""Days after the last event of a run: if Dagster has stored its result, or it never got a job; if it failed."""


def make_cleaning_sensor(project: Project) -> dg.SensorDefinition:
    """Make the sensor that removes old run directories."""

    @dg.sensor(
        name="clean_run_directories",
        minimum_interval_seconds=CLEAN_EVERY,
        default_status=running_on_supercomputer(project),
        description=f"Removes run directories from the supercomputer {KEEP_DAYS} days after their job has succeeded, "
        f"if Dagster has stored the result, and {KEEP_FAILED_DAYS} days after their job has failed; those that never "
        f"got a job after {KEEP_DAYS} days. "
        "That of an array job stays as long as Dagster has not stored the partition of a task that succeeded.",
    )
    def clean_run_directories(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        settings, now = project.load_settings(supercomputer=True), datetime.now(UTC)
        if reason := wait_for_access(settings):
            return dg.SkipReason(reason)
        try:
            with open_runs(settings, project, TICK_SECONDS) as runs:
                found, list_tasks = runs.all(), partial(TaskList, runs)
                old = (run for run in found if is_obsolete(context.instance, run, now - run.changed, list_tasks))
                removed = runs.gateway.clean(runs.folder, [run.key for run in old])
                for run in found:
                    if run.end is None and now - run.changed > timedelta(days=KEEP_DAYS):
                        runs.gateway.state(run.path)  # it records an end that nobody has asked for, for the next tick
        except NO_ACCESS as error:
            return dg.SkipReason(str(error))
        return dg.SkipReason(f"removed {', '.join(removed)}" if removed else "nothing is old enough")

    return clean_run_directories


def is_obsolete(
    instance: dg.DagsterInstance, run: RunRecord, age: timedelta, list_tasks: Callable[[RunRecord], TaskList]
) -> bool:
    """Return whether nobody needs a run directory any more.

    A result that Dagster has not stored is kept, whatever its age; of an array job, each task has its own.

    `age`: since the last event of its job.
    """
    if age < timedelta(days=KEEP_DAYS):
        return False
    if run.end is None:
        return run.job is None  # sbatch has refused it; the agent keeps one that may still get a job
    if not run.end.succeeded and age < timedelta(days=KEEP_FAILED_DAYS):
        return False
    if (run.end.succeeded or run.array) and not is_stored(instance, run.followers, run.about.step_name):
        return run.array and _are_stored(instance, run, list_tasks(run))
    return True


def _are_stored(instance: dg.DagsterInstance, run: RunRecord, tasks: TaskList) -> bool:
    """Return whether Dagster has stored the partitions of all tasks that have succeeded, though their step failed."""
    stored = stored_before(instance, run.followers, run.about.step_name)
    done = (tasks.partitions[task.index] for task in tasks.records() if task.kind == "done")
    known = len(tasks) > 0  # its record can be read
    return known and all(partitions and stored.issuperset(partitions) for partitions in done)
