"""Fails runs whose process is gone: after a reboot or a killed service, Dagster shows them as STARTED for ever."""

import json
from pathlib import Path

import dagster as dg
import psutil

from dagster_sbatch.run_launcher.run_process import RunProcess


@dg.sensor(
    name="end_dead_runs",
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Fails runs whose process has ended without reporting it, so that they are retried; a retry adopts the "
    "Slurm job of its predecessor.",
)
def end_dead_runs_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
    """Make one tick; the first comes right after Dagster's start. The cursor holds the processes of living runs."""
    instance = context.instance
    if not isinstance(instance.run_launcher, dg.DefaultRunLauncher):  # others start runs on other machines
        launcher = type(instance.run_launcher).__name__
        return dg.SensorResult(skip_reason=f"runs are started by {launcher}, which watches them itself")
    known: dict[str, str] = json.loads(context.cursor or "{}")
    living: dict[str, str] = {}
    ended = []
    for record in instance.get_run_records(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])):
        forked = RunProcess.of(record.dagster_run)
        if forked and instance.run_monitoring_enabled:
            continue  # Dagster's run monitoring asks ForkingRunLauncher about these
        run_id = record.dagster_run.run_id
        pid = forked.pid if forked else _find_pid(instance, run_id)
        if pid is None:
            continue
        key = f"{run_id} {pid}"
        process = _identify(pid, forked.begin if forked else known.get(key))
        if process is not None:
            living[key] = process
        elif _is_started(instance, run_id):  # asked after the process: one that ends well reports it before it goes
            instance.report_run_failed(
                record.dagster_run, f"Process {pid} of this run is gone, and has not reported how the run ended."
            )
            ended.append(run_id)
    reason = f"ended {', '.join(ended)}" if ended else "every run that has started has a living process"
    return dg.SensorResult(skip_reason=reason, cursor=json.dumps(living))


def _find_pid(instance: dg.DagsterInstance, run_id: str) -> int | None:
    started = instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.RUN_START, limit=1, ascending=False)
    return started.records[0].event_log_entry.get_dagster_event().pid if started.records else None


def _is_started(instance: dg.DagsterInstance, run_id: str) -> bool:
    run = instance.get_run_by_id(run_id)
    return run is not None and run.status == dg.DagsterRunStatus.STARTED


def _identify(pid: int, known: str | None) -> str | None:
    """Return what identifies a run's process, without the clock, which may be set at any time; None if it is gone.

    Args:
        pid: of the run.
        known: what this returned for it before. Without that, the process is the run's if it is a Python.
    """
    process = RunProcess.find(pid)
    if process is None or known is None:
        return process.begin if process and _is_python(pid) else None
    return process.begin if process.begin == known else None


def _is_python(pid: int) -> bool:
    try:
        return "python" in Path(psutil.Process(pid).exe()).name
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
