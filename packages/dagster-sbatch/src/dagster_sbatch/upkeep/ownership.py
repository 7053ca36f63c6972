"""Which Slurm jobs belong to a Dagster run, and which of the others have to be cancelled."""

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Literal

import dagster as dg

from dagster_sbatch.inspect.remote_runs import RunRecord, Runs
from dagster_sbatch.run.history import age_of, group_of, is_stored, runs_since

GRACE = timedelta(minutes=1)
"""Pause after the end of a run: a person or Dagster may be about to request its retry or re-execution."""
RETRY_PATIENCE = timedelta(minutes=2)
"""Time within which Dagster retries a run, if it does. It examines each failure once. It misses the retry if the event
log has the failure then and the run does not have its new status yet, or if its database is locked."""
REPEATED = "dagster_sbatch/failure_repeated"
"""Tag of a run with its id: its failure was reported again, so that Dagster examines it again. Retries inherit tags."""
GroupState = Literal["alive", "retry due", "retry missed", "just ended", "over", "unknown"]


def group_state(instance: dg.DagsterInstance, root: str, now: datetime) -> GroupState:
    """Return the state of a group: the run `root` with its retries and re-executions; unknown if all were deleted."""
    records = group_of(instance, root).values()
    if not records:
        return "unknown"
    if not all(record.dagster_run.is_finished for record in records):
        return "alive"
    newest = _newest(records)
    tags, failed = newest.dagster_run.tags, newest.dagster_run.status == dg.DagsterRunStatus.FAILURE
    if failed and tags.get("dagster/will_retry") == "true" and "dagster/auto_retry_run_id" not in tags:
        if _has_ended_within(RETRY_PATIENCE, newest, now):
            return "retry due"
        if tags.get(REPEATED) != newest.dagster_run.run_id:
            return "retry missed"
    return "just ended" if any(_has_ended_within(GRACE, record, now) for record in records) else "over"


def repeat_failures(instance: dg.DagsterInstance, roots: Iterable[str]) -> None:
    """Report the failure of the newest run of each group again: Dagster has missed its retry."""
    for root in roots:
        run = _newest(group_of(instance, root).values()).dagster_run
        instance.report_run_failed(
            run, "Dagster has not retried this run. Its failure is reported again, so that it does."
        )
        instance.add_run_tags(run.run_id, {REPEATED: run.run_id})  # the report may fail: then the next tick repeats it


def _newest(records: Iterable[dg.RunRecord]) -> dg.RunRecord:
    return max(records, key=age_of)


def _has_ended_within(span: timedelta, record: dg.RunRecord, now: datetime) -> bool:
    ended = record.end_time or record.update_timestamp.timestamp()
    return abs(now.timestamp() - ended) < span.total_seconds()  # one that ended later than now: a clock was ahead


def reason_to_cancel(instance: dg.DagsterInstance, run: RunRecord) -> str:
    """Return why the job of a run has to be cancelled; empty if a re-execution may attach to it.

    It is cancelled if a person terminated the last run that followed it, or if the step has succeeded with another job
    in that run or a later one. It is kept if its step or process failed while it was running.
    """
    group = group_of(instance, run.about.root)
    followers = [group[each] for each in run.followers if each in group]
    if not followers:
        return ""
    if _newest(followers).dagster_run.status == dg.DagsterRunStatus.CANCELED:
        return "its run was terminated"
    since = runs_since(instance, run.about.root, run.followers)
    return "its step has succeeded with another job" if is_stored(instance, since, run.about.step_name) else ""


def describe_left(run: RunRecord, state: str) -> str:
    """Return what to do about a job that no run follows, and that a re-execution can attach to."""
    return (
        f"Slurm job {run.job} ({run.about.asset}) is {state}, and no Dagster run follows it. "
        f"Re-execute run {run.followers[-1]} to attach to it again, or cancel it:\n  scripts/job {run.job} cancel"
    )


def left_jobs(instance: dg.DagsterInstance, runs: Runs) -> Iterator[str]:
    """Describe the waiting and running jobs that no run follows and that a re-execution can attach to."""
    now = datetime.now(UTC)
    for run in runs.all():
        if not run.job or run.end or group_state(instance, run.about.root, now) not in ("over", "just ended"):
            continue
        state = None if reason_to_cancel(instance, run) else runs.gateway.state(run.path)[0]
        if state:
            yield describe_left(run, state.state)
