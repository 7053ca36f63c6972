"""Runs whose process is gone: after a reboot or a killed service, Dagster leaves them STARTED for ever."""

import dagster as dg
import psutil

CLOCK_SECONDS = 5.0
"""A process that began so much later than its run's first word is another one under the same number."""
OWN_LAUNCHER = "DefaultRunLauncher"
"""Starts runs on this machine; what other launchers start cannot be seen from here."""


@dg.sensor(
    name="end_dead_runs",
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Fails runs whose process has gone without a word, so that they are retried; a retry adopts the Slurm "
    "job of its predecessor.",
)
def end_dead_runs_sensor(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """One tick; the first comes right after Dagster's start."""
    instance = context.instance
    if type(instance.run_launcher).__name__ != OWN_LAUNCHER:
        return dg.SkipReason(
            f"runs are started by {type(instance.run_launcher).__name__}, which looks after them itself"
        )
    ended = []
    for record in instance.get_run_records(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])):
        run = record.dagster_run
        pid = find_dead_process(instance, run.run_id)
        if pid is not None:
            instance.report_run_failed(run, f"Process {pid} of this run is gone, and has not said how the run ended.")
            ended.append(run.run_id)
    return dg.SkipReason(f"ended {', '.join(ended)}" if ended else "every run that has started has a living process")


def find_dead_process(instance: dg.DagsterInstance, run_id: str) -> int | None:
    """The pid of a run that is STARTED and whose process is gone; None if it lives, or has ended properly."""
    started = instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.RUN_START, limit=1, ascending=False)
    if not started.records:
        return None
    entry = started.records[0].event_log_entry
    pid = entry.get_dagster_event().pid
    if pid is None or _lives(pid, entry.timestamp):
        return None
    run = instance.get_run_by_id(run_id)  # after that look: a process that ends well says so before it goes
    return pid if run is not None and run.status == dg.DagsterRunStatus.STARTED else None


def _lives(pid: int, spoken: float) -> bool:
    """Whether a process is the one that spoke at that time (seconds since 1970)."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= spoken + CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return False
