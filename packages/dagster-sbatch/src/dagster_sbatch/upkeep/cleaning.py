"""Run directories that nobody needs any more: a sensor removes them."""

from datetime import UTC, datetime, timedelta

import dagster as dg

from dagster_sbatch.auth import check_health
from dagster_sbatch.inspect.remote_runs import RunRecord, open_runs
from dagster_sbatch.project import Project
from dagster_sbatch.run.history import is_stored
from dagster_sbatch.upkeep import running_on_supercomputer
from dagster_sbatch.upkeep.orphans import NO_ACCESS, TICK_SECONDS

CLEAN_EVERY = 6 * 3600
KEEP_DAYS, KEEP_FAILED_DAYS = 14, 90
"""After the end of a job: of those whose result Dagster has stored, and of those that have failed."""


def make_cleaning_sensor(project: Project) -> dg.SensorDefinition:
    """Make the sensor that removes old run directories."""

    @dg.sensor(
        name="clean_run_directories",
        minimum_interval_seconds=CLEAN_EVERY,
        default_status=running_on_supercomputer(project),
        description=f"Removes run directories from the supercomputer {KEEP_DAYS} days after their job has succeeded, "
        f"if Dagster has stored the result, and {KEEP_FAILED_DAYS} days after their job has failed.",
    )
    def clean_run_directories(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        settings, now = project.load_settings(supercomputer=True), datetime.now(UTC)
        health = check_health(settings)
        if health.verdict != "ok":  # the refresh job renews access; this sensor only uses it
            return dg.SkipReason(f"waits until access is in order: {health.summary}")
        try:
            with open_runs(settings, project, TICK_SECONDS) as runs:
                old = (run for run in runs.all() if is_obsolete(context.instance, run, now - run.heard))
                removed = runs.remove(old)
        except NO_ACCESS as error:
            return dg.SkipReason(str(error))
        return dg.SkipReason(f"removed {', '.join(removed)}" if removed else "nothing is old enough")

    return clean_run_directories


def is_obsolete(instance: dg.DagsterInstance, run: RunRecord, age: timedelta) -> bool:
    """Return whether nobody needs a run directory any more; `age`: since the last event of its job.

    A result that Dagster has not stored is kept, whatever its age.
    """
    if run.end is None or age < timedelta(days=KEEP_DAYS):
        return False
    if run.end.code == 0 and run.end.state in ("COMPLETED", ""):
        return is_stored(instance, run.followers, run.about.step)
    return age > timedelta(days=KEEP_FAILED_DAYS)
