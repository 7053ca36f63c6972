"""What Dagster has recorded of a step."""

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

import dagster as dg

PAGE = 1000
CREATED_SECONDS = 1.0
"""SQLite cuts the fraction off the time at which a run was created."""


def is_stored(instance: dg.DagsterInstance, runs: Iterable[str], step: str, before: datetime | None = None) -> bool:
    """Return whether Dagster has stored the result of a step in one of some runs.

    Args:
        instance: that knows the runs; one that was deleted has stored nothing.
        runs: their ids.
        step: Dagster's key of the step; empty: every step of the run.
        before: count only what was stored by then.
    """
    latest = before.timestamp() + CREATED_SECONDS if before else float("inf")
    return any(_succeeded(instance, run, step, latest) for run in runs)


def has_ended(instance: dg.DagsterInstance, run: str, step: str) -> bool:
    """Return whether a step has succeeded or failed in a run; one that was interrupted has done neither."""
    ends = {dg.DagsterEventType.STEP_SUCCESS, dg.DagsterEventType.STEP_FAILURE}
    return any(entry.step_key == step for entry in _events(instance, run, ends))


def created_at(instance: dg.DagsterInstance, run_id: str) -> datetime | None:
    """Return when a run was asked for; None if it was deleted."""
    record = instance.get_run_record_by_id(run_id)
    return record.create_timestamp.astimezone(UTC) if record else None


def _succeeded(instance: dg.DagsterInstance, run_id: str, step: str, latest: float) -> bool:
    if not step:
        run = instance.get_run_by_id(run_id)
        return run is not None and run.status == dg.DagsterRunStatus.SUCCESS
    entries = _events(instance, run_id, {dg.DagsterEventType.STEP_SUCCESS})
    return any(entry.step_key == step and entry.timestamp <= latest for entry in entries)


def _events(instance: dg.DagsterInstance, run_id: str, kinds: set[dg.DagsterEventType]) -> Iterator[dg.EventLogEntry]:
    cursor, more = None, True
    while more:
        page = instance.get_records_for_run(run_id, cursor, of_type=kinds, limit=PAGE)
        yield from (record.event_log_entry for record in page.records)
        cursor, more = page.cursor, page.has_more
