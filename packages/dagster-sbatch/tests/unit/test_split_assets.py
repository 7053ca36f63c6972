"""A multi-asset that Dagster divides into two steps: their names depend on the assets that a run selects."""

from collections.abc import Iterator
from datetime import UTC, datetime

import dagster as dg
import pytest
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.execution.api import execute_run

from dagster_sbatch.inspect.remote_runs import RunRecord
from dagster_sbatch.run.calls import StepName
from dagster_sbatch.run.directory import RunInfo
from dagster_sbatch.run.history import earlier_job, is_stored, key_in, stored_before
from dagster_sbatch.upkeep.ownership import reason_to_cancel

ALL = ("a", "between", "b")
contexts: list[dg.OpExecutionContext] = []


@dg.multi_asset(
    specs=[dg.AssetSpec("a", skippable=True), dg.AssetSpec("b", deps=["between"], skippable=True)],
    can_subset=True,
    partitions_def=dg.StaticPartitionsDefinition(["1"]),
)
def both(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult]:
    contexts.append(context.op_execution_context)
    if context.run.tags.get("fails") and dg.AssetKey("b") in context.selected_asset_keys:
        raise ValueError
    for key in sorted(context.selected_asset_keys):
        yield dg.MaterializeResult(key)


@dg.asset(deps=["a"], partitions_def=both.partitions_def)
def between() -> None: ...


@pytest.fixture(autouse=True)
def no_contexts() -> None:
    contexts.clear()


def make(
    instance: dg.DagsterInstance, *assets: str, parent: str | None = None, killed: bool = False, **tags: str
) -> str:
    """Request a run, or a re-execution, that selects some assets, and execute it unless it is killed; return its id."""
    job = dg.Definitions(
        assets=[both, between], jobs=[dg.define_asset_job("all", executor_def=dg.in_process_executor)]
    ).resolve_job_def("all")
    job = job.get_subset(asset_selection={dg.AssetKey(each) for each in assets})
    root = (found.root_run_id or parent) if parent and (found := instance.get_run_by_id(parent)) else None
    tags |= {"dagster/partition": "1", **({"dagster/root_run_id": root} if root else {})}
    run = instance.create_run_for_job(
        job, tags=tags, root_run_id=root, parent_run_id=parent, asset_selection=frozenset(job.asset_selection or ())
    )
    if not killed:
        execute_run(InMemoryJob(job), run, instance)
    return run.run_id


def test_a_step_of_a_re_execution_is_the_same_one_under_its_other_name(instance: dg.DagsterInstance) -> None:
    """`both` of the first run was another step: what that has stored is not the result of this one."""
    root = make(instance, *ALL, fails="yes")
    instance.add_run_tags(root, {"slurm_job/both_2": "79"})
    again = make(instance, "b", parent=root, fails="yes")
    last = make(instance, "b", parent=again)
    names = [StepName.of(context) for context in contexts]
    assert [name.key for name in names] == ["both", "both_2", "both", "both"]
    assert [key_in(instance, root, name) for name in names] == ["both", "both_2", "both_2", "both_2"]
    assert [is_stored(instance, [root], name) for name in names] == [True, False, False, False]
    for name in names[1:]:
        assert is_stored(instance, [root, again, last], name)
        assert stored_before(instance, [root, again], name) == set()
        assert stored_before(instance, [last], name) == {"1"}
    assert earlier_job(contexts[2])[1] is False  # it has failed in that run


def test_the_job_of_an_interrupted_step_is_found_under_its_other_name(instance: dg.DagsterInstance) -> None:
    root = make(instance, *ALL, killed=True)
    for step in ("both", "both_2"):
        start = dg.DagsterEvent(dg.DagsterEventType.STEP_START.value, "all", step_key=step)
        instance.report_dagster_event(start, root)
    instance.add_run_tags(root, {"slurm_job/both": "78", "slurm_job/both_2": "79"})
    make(instance, "b", parent=root)
    assert earlier_job(contexts[0]) == ("79", True)


def record(instance: dg.DagsterInstance, run: str, step: str) -> RunRecord:
    """Return the record of a job of `b` that only its own run has followed."""
    found = instance.get_run_by_id(run)
    assert found
    about = RunInfo(run, found.root_run_id or run, "b", "1", step=step)
    return RunRecord("/runs/both-1", "79", about, None, datetime.now(UTC), (run,))


def test_a_job_is_cancelled_if_its_step_has_succeeded_under_its_other_name(instance: dg.DagsterInstance) -> None:
    root = make(instance, *ALL, fails="yes")
    job = record(instance, root, "both_2")
    assert not reason_to_cancel(instance, job)
    make(instance, "b", parent=root)
    assert reason_to_cancel(instance, job) == "its step has succeeded with another job"


def test_a_job_is_kept_if_another_step_of_its_name_has_succeeded(instance: dg.DagsterInstance) -> None:
    """An older engine has submitted it, under the name that its step had in that run."""
    root = make(instance, *ALL, fails="yes")
    again = make(instance, "b", parent=root, fails="yes")
    make(instance, *ALL, parent=root, fails="yes")
    assert not reason_to_cancel(instance, record(instance, again, "both"))
