"""The job of a step in an earlier run: it may be running; if the step was interrupted, no error on the way is final."""

from typing import Any

import dagster as dg
import pytest

from dagster_sbatch.run.history import earlier_job


class Step:
    """As much of a step's context as is read."""

    def __init__(self, instance: dg.DagsterInstance, parent: str | None) -> None:
        self.instance = instance
        self.run = dg.DagsterRun(job_name="job", parent_run_id=parent, root_run_id=parent)
        self.op_handle, self.selected_asset_keys = "work", ()

    def get_mapping_key(self) -> None:
        """It is no dynamic output's."""


def earlier(instance: dg.DagsterInstance, parent: str | None) -> tuple[str | None, bool]:
    context: Any = Step(instance, parent)
    return earlier_job(context)


def interrupted(instance: dg.DagsterInstance, parent: str | None = None, **tags: str) -> str:
    """Make a run in which no step has ended."""
    run = dg.DagsterRun(job_name="job", parent_run_id=parent, root_run_id=parent)
    instance.add_run(run)
    for step in tags:
        start = dg.DagsterEvent(dg.DagsterEventType.STEP_START.value, "job", step_key=step)
        instance.report_dagster_event(start, run.run_id)
    if tags:
        instance.add_run_tags(run.run_id, {f"slurm_job/{step}": job for step, job in tags.items()})
    return run.run_id


def test_the_job_of_an_interrupted_step(instance: dg.DagsterInstance) -> None:
    first = interrupted(instance, work="79")
    assert earlier(instance, first) == ("79", True)
    assert earlier(instance, interrupted(instance, first)) == ("79", True)  # that one never came to it
    for parent in (interrupted(instance, other="79"), None, "deleted"):
        assert earlier(instance, parent) == (None, False)


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_that_has_ended_was_not_interrupted(instance: dg.DagsterInstance, fails: bool) -> None:
    @dg.op
    def work(context: dg.OpExecutionContext) -> None:
        context.instance.add_run_tags(context.run_id, {"slurm_job/work": "79"})
        if fails:
            raise ValueError

    @dg.job
    def job() -> None:
        work()

    parent = job.execute_in_process(instance=instance, raise_on_error=False).run_id
    assert earlier(instance, parent) == ("79", False)
    skipped = interrupted(instance, parent)
    instance.add_run_tags(skipped, {"slurm_job/work": "79"})  # Dagster copies the tags of a run that it re-executes
    assert earlier(instance, skipped) == ("79", False)
