"""What Dagster has recorded of a step."""

from collections.abc import Iterable

import dagster as dg

PAGE = 1000


def is_stored(instance: dg.DagsterInstance, runs: Iterable[str], step: str) -> bool:
    """Return whether Dagster has stored the result of a step in one of some runs.

    Args:
        instance: that knows the runs; one that was deleted has stored nothing.
        runs: their ids.
        step: Dagster's key of the step; empty: every step of the run.
    """
    return any(_succeeded(instance, run, step) for run in runs)


def _succeeded(instance: dg.DagsterInstance, run_id: str, step: str) -> bool:
    if not step:
        run = instance.get_run_by_id(run_id)
        return run is not None and run.status == dg.DagsterRunStatus.SUCCESS
    cursor, more = None, True
    while more:
        page = instance.get_records_for_run(run_id, cursor, of_type=dg.DagsterEventType.STEP_SUCCESS, limit=PAGE)
        if any(record.event_log_entry.step_key == step for record in page.records):
            return True
        cursor, more = page.cursor, page.has_more
    return False
