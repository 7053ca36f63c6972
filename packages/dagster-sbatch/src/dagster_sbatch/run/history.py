"""What Dagster has recorded of a step."""

from collections.abc import Iterable, Iterator

import dagster as dg

PAGE = 1000


def is_stored(instance: dg.DagsterInstance, runs: Iterable[str], step: str, before: float | None = None) -> bool:
    """Return whether Dagster has stored the result of a step in one of some runs.

    Args:
        instance: that knows the runs; one that was deleted has stored nothing.
        runs: their ids.
        step: Dagster's key of the step; empty: every step of the run.
        before: count only what was stored by then, in seconds since 1970.
    """
    latest = float("inf") if before is None else before
    return any(_succeeded(instance, run, step, latest) for run in runs)


def has_ended(instance: dg.DagsterInstance, run: str, step: str) -> bool:
    """Return whether a step has succeeded or failed in a run; one that was interrupted has done neither."""
    ends = {dg.DagsterEventType.STEP_SUCCESS, dg.DagsterEventType.STEP_FAILURE}
    return any(entry.step_key == step for entry in _events(instance, run, ends))


def first_heard(instance: dg.DagsterInstance, run_id: str) -> float | None:
    """Return the time of a run's first event, in seconds since 1970; None if it was deleted.

    That is when it was asked for. Dagster's own time of its creation has no fraction of a second in SQLite.
    """
    records = instance.get_records_for_run(run_id, limit=1, ascending=True).records
    return records[0].event_log_entry.timestamp if records else None


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
