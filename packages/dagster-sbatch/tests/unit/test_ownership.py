"""Whose a job is that no run follows: cancelled only if a person terminated its run, or nobody can want it."""

from datetime import UTC, datetime, timedelta
from typing import cast

import dagster as dg
import sqlalchemy
from dagster._core.storage.runs import SqlRunStorage

from dagster_sbatch.inspect.remote_runs import RunRecord
from dagster_sbatch.run.directory import RunInfo
from dagster_sbatch.upkeep.ownership import describe_left, group_state, reason_to_cancel

TERMINATED, SUCCEEDED = "its run was terminated", "its step has succeeded with another job"


def execute(instance: dg.DagsterInstance, root: str | None = None, *, work: bool, other: bool) -> str:
    """Make a run with the steps `work` and `other`, each of which succeeds or fails; its id."""

    @dg.op(name="work")
    def do_work() -> None:
        if not work:
            raise ValueError

    @dg.op(name="other")
    def do_other() -> None:
        if not other:
            raise ValueError

    @dg.job
    def both() -> None:
        do_work()
        do_other()

    tags = {"dagster/root_run_id": root} if root else None
    return both.execute_in_process(instance=instance, raise_on_error=False, tags=tags).run_id


def record(root: str, *followers: str, step: str = "work") -> RunRecord:
    about = RunInfo(run=root, root=root, asset="asset", partitions="", step=step)
    return RunRecord("/runs/work-1", "7", about, None, datetime.now(UTC), followers)


def cancel(instance: dg.DagsterInstance, run_id: str) -> None:
    run = instance.get_run_by_id(run_id)
    assert run is not None
    instance.report_run_canceled(run)


def test_a_job_whose_step_failed_is_kept(instance: dg.DagsterInstance) -> None:
    run = execute(instance, work=False, other=True)
    assert reason_to_cancel(instance, record(run, run)) == ""
    again = execute(instance, run, work=False, other=True)
    assert reason_to_cancel(instance, record(run, run, again)) == ""


def test_a_job_whose_run_was_terminated_is_cancelled(instance: dg.DagsterInstance) -> None:
    run = execute(instance, work=False, other=True)
    cancel(instance, run)
    assert reason_to_cancel(instance, record(run, run)) == TERMINATED


def test_the_last_run_that_followed_the_job_counts(instance: dg.DagsterInstance) -> None:
    first = execute(instance, work=False, other=True)
    cancel(instance, first)
    second = execute(instance, first, work=False, other=True)
    assert reason_to_cancel(instance, record(first, first, second)) == ""
    cancel(instance, second)
    assert reason_to_cancel(instance, record(first, second, first)) == TERMINATED


def test_a_terminated_run_that_never_followed_the_job_does_not_count(instance: dg.DagsterInstance) -> None:
    """A re-execution of other steps, for instance."""
    first = execute(instance, work=False, other=False)
    cancel(instance, execute(instance, first, work=False, other=True))
    assert reason_to_cancel(instance, record(first, first)) == ""


def test_a_job_is_cancelled_once_its_step_has_succeeded_with_another(instance: dg.DagsterInstance) -> None:
    first = execute(instance, work=False, other=False)
    execute(instance, first, work=False, other=True)
    assert reason_to_cancel(instance, record(first, first)) == ""
    execute(instance, first, work=True, other=False)
    assert reason_to_cancel(instance, record(first, first)) == SUCCEEDED


def test_a_success_before_the_job_does_not_count(instance: dg.DagsterInstance) -> None:
    first = execute(instance, work=True, other=True)
    second = execute(instance, first, work=False, other=True)
    assert reason_to_cancel(instance, record(first, second)) == ""


def test_the_clock_was_set_back_after_the_first_run(instance: dg.DagsterInstance) -> None:
    """Dagster has the later runs as created before it."""
    first = execute(instance, work=False, other=True)
    cancel(instance, first)
    ahead = sqlalchemy.text("UPDATE runs SET create_timestamp = datetime(create_timestamp, '+10 minutes')")
    with cast(SqlRunStorage, instance.run_storage).connect() as connection:
        connection.execute(ahead)
    second = execute(instance, first, work=False, other=True)
    assert reason_to_cancel(instance, record(first, first, second)) == ""
    execute(instance, first, work=True, other=True)
    assert reason_to_cancel(instance, record(first, first, second)) == SUCCEEDED


def test_a_job_of_runs_that_nobody_knows_is_kept(instance: dg.DagsterInstance) -> None:
    assert reason_to_cancel(instance, record("unknown", "unknown")) == ""


def test_a_retry_is_known_after_its_first_run_was_deleted(instance: dg.DagsterInstance) -> None:
    """Otherwise its job would never be listed, or cancelled if a person had terminated the retry."""
    later = datetime.now(UTC) + timedelta(days=1)
    root = execute(instance, work=False, other=True)
    retry = execute(instance, root, work=False, other=True)
    instance.delete_run(root)
    assert group_state(instance, root, later) == "over"
    instance.delete_run(retry)
    assert group_state(instance, root, later) == "unknown"


def test_what_is_said_of_a_job_that_is_left() -> None:
    assert describe_left(record("root", "root", "last"), "RUNNING") == (
        "Slurm job 7 (asset) is RUNNING, and no Dagster run follows it. "
        "Re-execute run last to attach to it again, or cancel it:\n  scripts/job 7 cancel"
    )
