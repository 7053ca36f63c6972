"""The tasks of an array as the step sees them, in a Dagster that takes its time for each event."""

import json
import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch import JobArray, ScriptLauncher, SlurmRequest
from dagster_sbatch.run import remote_step
from dagster_sbatch.run.array_results import table
from dagster_sbatch.run.array_step import ArrayStep
from dagster_sbatch.run.past_use import last_proposals, past_uses
from dagster_sbatch.run.plan import Plan, make_plan
from dagster_sbatch.run.remote_array import RemoteArray, _ArrayJob
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm.gateway import JobEnd, RemovedError, StoppedError, TaskStates
from resources import PROJECT

KEYS = [f"{number:03}" for number in range(20)]
SETTINGS = Settings.model_construct(supercomputer_site="musica")


def say(method: str, **params: Any) -> bytes:
    message = {"__dagster_pipes_version": "0.1", "method": method, "params": params}
    return json.dumps(message).encode() + b"\n"


def succeed(step: ArrayStep, index: int) -> None:
    step.progress.started.add(index)
    step.reader(index).messages.feed(say("opened", extras={}) + say("closed").rstrip())  # a last line may lack its end
    assert step.ended(index, 0, {"job_id": f"17_{index}"}, {"node_hours": 0.5}, "logs")


def fail(step: ArrayStep, index: int) -> None:
    step.progress.started.add(index)
    step.reader(index).stderr.feed(b"slurmstepd-n1: error: Detected 1 oom_kill event in StepId=17.0.\n")
    assert not step.ended(index, 1, {}, {}, "logs")


def plan_of_all(keys: list[str] = KEYS) -> Plan:
    extras = {"partition_keys": keys}
    return make_plan(
        SETTINGS, PROJECT, Path(__file__), ScriptLauncher(), SlurmRequest(), extras=extras, array=JobArray()
    )


def test_the_step_does_not_wait_while_dagster_stores_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """It follows and cancels its jobs meanwhile; the run ends when Dagster has stored all."""
    go_on, stored = threading.Event(), []
    log_event = dg.OpExecutionContext.log_event

    def log_slowly(context: dg.OpExecutionContext, event: dg.AssetMaterialization) -> None:
        if not go_on.wait(60):
            go_on.set()
            raise TimeoutError
        stored.append(event.partition)
        log_event(context, event)

    monkeypatch.setattr(dg.OpExecutionContext, "log_event", log_slowly)
    plan = plan_of_all()

    @dg.asset(partitions_def=dg.StaticPartitionsDefinition(KEYS), backfill_policy=dg.BackfillPolicy.single_run())
    def many(context: dg.AssetExecutionContext) -> None:
        step = ArrayStep(context.op_execution_context, "many", plan)
        step.where = {"partition": "zen4"}
        with step.open():
            for index in range(10):
                succeed(step, index)
            fail(step, 10)
            for index in range(11, 20):
                succeed(step, index)
            step.store_completed()
            assert stored == []
            go_on.set()
            step.wait_until_stored()
        step.complete()

    tags = {"dagster/asset_partition_range_start": KEYS[0], "dagster/asset_partition_range_end": KEYS[-1]}
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([many], tags=tags, instance=instance, raise_on_error=False)
        kinds = {dg.DagsterEventType.ASSET_MATERIALIZATION}
        records = instance.get_records_for_run(result.run_id, of_type=kinds).records
    found = [record.event_log_entry.asset_materialization for record in records]
    assert [each.partition for each in found if each] == [*KEYS[:10], *KEYS[11:]]
    assert all(each.metadata["partition"].value == "zen4" for each in found if each)
    (failure,) = result.get_step_failure_events()
    assert "1 of 20 tasks failed. The other tasks have materialized 19 partitions." in str(failure)
    assert "1 task (010): it ran out of memory on n1, and the system killed some of its processes" in str(failure)


@pytest.mark.parametrize("by_name", [False, True])
def test_the_proposal_of_an_array_is_metadata_of_its_first_partition_or_of_the_asset(by_name: bool) -> None:
    keys = KEYS[:2]
    array = JobArray(tasks={key: {} for key in keys}) if by_name else JobArray()
    extras = {} if by_name else {"partition_keys": keys}
    plan = make_plan(SETTINGS, PROJECT, Path(__file__), ScriptLauncher(), SlurmRequest(), extras=extras, array=array)
    numbers = {"elapsed_seconds": 360.0, "node_hours": 0.1, "cpu_hours": 0.1}

    @dg.asset(
        partitions_def=None if by_name else dg.StaticPartitionsDefinition(keys),
        backfill_policy=None if by_name else dg.BackfillPolicy.single_run(),
    )
    def probe(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        step = ArrayStep(context.op_execution_context, "probe", plan)
        with step.open():
            for index in range(2):
                succeed(step, index)
                step.add_costs(index, {**numbers, **({"max_rss_mib": 7.5} if index else {})})
        step.where = {"partition": plan.allocation.request.partition}
        done = step.complete()
        return done.get_materialize_result()

    tags = {"dagster/asset_partition_range_start": keys[0], "dagster/asset_partition_range_end": keys[-1]}
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([probe], tags={} if by_name else tags, instance=instance)
        uses = past_uses(instance, [dg.AssetKey("probe")])
        ((used, code),) = last_proposals(instance, ["probe"]).values()
    events = result.asset_materializations_for_node("probe")
    place = str(plan.allocation.request.partition)
    assert {(use.slurm_partition, use.partition, use.seconds) for use in uses} == {(place, key, 360) for key in keys}
    texts = {event.partition: event.metadata["proposal"].value for event in events if "proposal" in event.metadata}
    assert list(texts) == [None if by_name else keys[0]]
    (text,) = texts.values()
    assert str(text).startswith("The last 2 jobs of this size used at most 00:06:00 of 01:00:00")
    assert code == 'SlurmRequest(time_limit="00:10:00")'
    assert str(text).startswith(used)
    assert code in str(text)


def test_tasks_that_have_recorded_their_ends_do_not_count_as_running() -> None:
    """Of two array jobs: the agent reports how many tasks run, until Slurm has confirmed the ends of the others."""

    @dg.asset
    def many(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        array = RemoteArray(context.op_execution_context, "many", SETTINGS, plan_of_all())
        with array._array.open():
            for run, tasks in (("a", range(10)), ("b", range(10, 20))):
                array._jobs_by_run[run] = _ArrayJob(dict(enumerate(tasks)), SlurmRequest(), share=2)
                array._runs[run] = "17"
                for task in range(4):
                    array.started(run, task, "n1", "/tmp")
                array.state(run, TaskStates(waiting=6, running=2, requeued=0, reason="None", start=None, account=""))
            array.started("b", 4, "n1", "/tmp")
        return dg.MaterializeResult()

    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([many], instance=instance)
        texts = [entry.user_message for entry in instance.all_logs(result.run_id)]
    shown = "20 tasks: 0 done, 5 running, 11 waiting, 0 failed, 4 ended (Slurm has not confirmed it yet)"
    assert shown in texts


def test_a_task_that_was_repeated_has_the_costs_of_its_last_job() -> None:
    """Also if the array job in which it failed is over later, and the accounting knows more of that one."""
    plan = plan_of_all(KEYS[:2])
    costs: list[float] = []

    @dg.asset
    def many(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        array: Any = RemoteArray(context.op_execution_context, "many", SETTINGS, plan)
        array._gateway = SimpleNamespace(reject=lambda *_: None)
        with array._array.open():
            for run, tasks in (("a", {0: 0, 1: 1}), ("b", {0: 0})):
                array._jobs_by_run[run] = _ArrayJob(tasks, plan.allocation.request, share=2)
                array._runs[run] = run
            array.ended("a", 0, JobEnd(75, "FAILED", "75:0", started=0, ended=7))
            array.sinks("b", 0)["messages.jsonl"](say("opened", extras={}) + say("closed"))
            array.ended("b", 0, JobEnd(0, "COMPLETED", "0:0", started=0, ended=99))
            for run, memory in (("b", "900M"), ("a", "100M")):
                array.over(run, {0: [["17_0", "COMPLETED", memory, "00:01"]]})
            costs.extend(array._array._results[0].costs[name] for name in ("elapsed_seconds", "max_rss_mib"))
        return dg.MaterializeResult()

    with dg.DagsterInstance.ephemeral() as instance:
        dg.materialize([many], instance=instance)
    assert costs == [99, 900]


def test_a_step_that_ends_before_its_tasks_reports_no_lost_messages() -> None:
    """Dagster warns of a session that is not closed; each task has closed its own, or was cancelled."""

    @dg.asset(partitions_def=dg.StaticPartitionsDefinition(KEYS), backfill_policy=dg.BackfillPolicy.single_run())
    def many(context: dg.AssetExecutionContext) -> None:
        step = ArrayStep(context.op_execution_context, "many", plan_of_all())
        with step.open():
            succeed(step, 0)
            raise StoppedError

    tags = {"dagster/asset_partition_range_start": KEYS[0], "dagster/asset_partition_range_end": KEYS[-1]}
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([many], tags=tags, instance=instance, raise_on_error=False)
        texts = [entry.user_message for entry in instance.all_logs(result.run_id)]
    assert not result.success
    assert [text for text in texts if "[pipes]" in text] == [
        "[pipes] external process successfully opened dagster pipes."
    ]


@pytest.mark.parametrize("removed", ["000", "001"])
def test_partitions_are_stored_if_one_of_them_was_removed_during_the_run(removed: str) -> None:
    """Dagster refuses the results of a step whose partitions do not all exist any more."""
    names, keys = "names", KEYS[:3]
    policy = dg.BackfillPolicy.single_run()

    @dg.asset(partitions_def=dg.DynamicPartitionsDefinition(name=names), backfill_policy=policy)
    def many(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        step = ArrayStep(context.op_execution_context, "many", plan_of_all(keys))
        with step.open():
            context.instance.delete_dynamic_partition(names, removed)
            for index in range(3):
                succeed(step, index)
        return step.complete().get_materialize_result()

    tags = {"dagster/asset_partition_range_start": keys[0], "dagster/asset_partition_range_end": keys[-1]}
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(names, keys)
        result = dg.materialize([many], tags=tags, instance=instance, raise_on_error=False)
        assert set(instance.get_materialized_partitions(dg.AssetKey("many"))) == set(keys)
    (failure,) = result.get_step_failure_events()
    assert "many: Dagster refuses the results of the step: " in str(failure)
    assert "If a partition was removed during the run: all others are stored." in str(failure)


def test_tasks_that_succeeded_are_stored_if_their_run_directory_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No later run can receive their results."""
    monkeypatch.setattr(remote_step, "make_gateway", lambda *_: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(RemoteArray, "_register", lambda _: None)

    def follow(array: RemoteArray) -> None:
        with array._array.open():
            array._runs["/base/runs/a-1"] = "17"
            succeed(array._array, 3)
            raise RemovedError("the run directory of Slurm job 17 was removed", "/base/runs/a-1")

    monkeypatch.setattr(RemoteArray, "_execute", follow)

    @dg.asset(partitions_def=dg.StaticPartitionsDefinition(KEYS), backfill_policy=dg.BackfillPolicy.single_run())
    def many(context: dg.AssetExecutionContext) -> None:
        RemoteArray(context.op_execution_context, "many", SETTINGS, plan_of_all()).run()

    tags = {"dagster/asset_partition_range_start": KEYS[0], "dagster/asset_partition_range_end": KEYS[-1]}
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([many], tags=tags, instance=instance, raise_on_error=False)
        assert set(instance.get_materialized_partitions(dg.AssetKey("many"))) == {KEYS[3]}
    assert "Slurm job 17 was removed" in str(result.get_step_failure_events())


def test_a_table_with_a_loss_that_is_no_number_is_shown_whole() -> None:
    """The UI reads each row as JSON, which knows neither NaN nor Infinity."""
    rows = [
        {"task": name, "loss": value, "epochs": 3} for name, value in (("a", math.nan), ("b", -math.inf), ("c", 0.5))
    ]
    found = table(rows)
    assert [json.loads(json.dumps(record.data, allow_nan=False))["loss"] for record in found.records] == [
        "nan",
        "-inf",
        0.5,
    ]
    assert {column.name: column.type for column in found.schema.columns}["epochs"] == "int"
