"""What decides a step's result beside what its asset passes: steps before it, code versions, the time of partitions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.execution.api import execute_run

from dagster_sbatch.run import history, step_inputs
from dagster_sbatch.run.array import Task
from dagster_sbatch.run.step_inputs import inputs_of_step, with_versions

seen: list[dict[str, Any]] = []
KILLED = "killed"


@dg.asset(code_version="1")
def files() -> None:
    """What the next asset reads: other data each time, by the same code."""


@dg.asset
def number() -> int:
    return 1


@dg.asset(deps=[files], code_version="3")
def reader(context: dg.AssetExecutionContext, number: int) -> None:
    seen.append(inputs_of_step(context.op_execution_context))
    if context.run.tags.get(KILLED):
        raise RuntimeError(number)


def make_job() -> dg.JobDefinition:
    job = dg.define_asset_job("all", executor_def=dg.in_process_executor)
    return dg.Definitions(assets=[files, number, reader], jobs=[job]).resolve_job_def("all")


def test_an_asset_that_is_materialized_again_is_another_input_of_those_that_wait_for_it(tmp_path: Path) -> None:
    """Its value is none: what the asset passes on of it counts. A re-execution that leaves it out has its files."""
    job, tags = dg.reconstructable(make_job), {KILLED: "yes"}
    seen.clear()
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:

        def execute(parent: dg.ReexecutionOptions | None = None) -> str:
            with dg.execute_job(job, instance, tags=tags, reexecution_options=parent) as result:
                return result.run_id

        def execute_from_asset_failure(parent: str) -> None:
            selection = {reader.key}
            subset = make_job().get_subset(asset_selection=selection)
            of: Any = {"root_run_id": parent, "parent_run_id": parent, "asset_selection": frozenset(selection)}
            run = instance.create_run_for_job(subset, tags=tags, **of)
            execute_run(InMemoryJob(subset), run, instance)

        first = execute()
        execute_from_asset_failure(first)
        from_failure = execute(dg.ReexecutionOptions.from_failure(first, instance))
        alone = execute(dg.ReexecutionOptions(from_failure, step_selection=["reader"]))
        again = execute(dg.ReexecutionOptions(alone))
        execute(dg.ReexecutionOptions.from_failure(again, instance))
        dg.materialize([files], instance=instance)
        execute(dg.ReexecutionOptions.from_failure(again, instance))
    versions = [each.pop("data version of files") for each in seen]
    assert versions == [versions[0]] * 4 + [versions[4]] * 2 + [versions[6]]
    assert len(set(versions)) == 3
    assert seen == [{"assets": ["reader"], "code_version of reader": "3"}] * 7


months = dg.StaticPartitionsDefinition(["1", "2", "3"])
observed = dg.AssetSpec("observed")


@dg.asset(partitions_def=months)
def monthly(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    return dg.MaterializeResult(data_version=dg.DataVersion(context.run.tags["version"]))


def test_the_newest_data_of_the_assets_before_it_are_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the partitions that it reads, and where Dagster does not materialize an asset, as it was observed.

    Of an asset of another code location it is not known which partitions that are.
    """
    reads = dg.AssetDep(monthly, partition_mapping=dg.SpecificPartitionsPartitionMapping(["1", "2"]))

    @dg.asset(deps=[reads, observed, "elsewhere"])
    def reader(context: dg.AssetExecutionContext) -> None:
        for by_partition in (False, True):
            seen.append(inputs_of_step(context.op_execution_context, by_partition=by_partition))

    def read() -> list[dict[str, Any]]:
        seen.clear()
        dg.materialize([reader, monthly, observed], selection=[reader], instance=instance)
        assert [each.pop("assets") for each in seen] == [["reader"], ["reader"]]
        return list(seen)

    def materialize(month: str, version: str) -> None:
        dg.materialize([monthly], partition_key=month, tags={"version": version}, instance=instance)

    with dg.DagsterInstance.ephemeral() as instance:
        assert read() == [{}, {}]
        materialize("2", "a")
        materialize("3", "b")
        assert read() == [{"data version of monthly": {"2": "a"}}] * 2
        materialize("1", "c")
        materialize("2", "a")  # the newest data of all is as before
        instance.report_runless_asset_event(dg.AssetMaterialization("elsewhere", partition="a"))
        expected = {"data version of monthly": {"1": "c", "2": "a"}}
        assert read() == [expected] * 2
        monkeypatch.setattr(step_inputs, "MOST_PARTITIONS", 1)
        very_many = read()
        materialize("1", "d")
        materialize("2", "a")  # the newest version of all is as before
        assert read() != very_many


@pytest.mark.parametrize("partition", [None, "2"])
def test_an_observation_is_of_newer_data_if_it_has_a_data_version(partition: str | None) -> None:
    """It may follow a materialization, which another program has reported. One without says nothing of the data."""
    raw = dg.AssetSpec("raw", partitions_def=months if partition else None)
    versions = []

    @dg.asset(deps=[raw])
    def reader(context: dg.AssetExecutionContext) -> None:
        found = inputs_of_step(context.op_execution_context).get("data version of raw", {})
        versions.append(found.get(partition) if isinstance(found, dict) else found)

    with dg.DagsterInstance.ephemeral() as instance:

        def read(event: dg.AssetObservation | dg.AssetMaterialization) -> str | None:
            instance.report_runless_asset_event(event)
            dg.materialize([reader, raw], selection=[reader], instance=instance)
            return versions[-1]

        def observe(version: str) -> str | None:
            return read(dg.AssetObservation("raw", partition=partition, tags={"dagster/data_version": version}))

        without = dg.AssetObservation("raw", partition=partition, metadata={"rows": 3})
        assert read(without) is None
        reported = read(dg.AssetMaterialization("raw", partition=partition))
        assert reported
        assert read(without) == reported
        assert observe("a") == read(without) == "a"
        assert observe("b") == "b"
        assert read(dg.AssetMaterialization("raw", partition=partition)) not in (reported, "b", None)


def test_a_multi_asset_reads_what_the_selected_ones_of_its_assets_depend_on() -> None:
    """What it computes itself is not among that: it may be stored when the step is executed again."""
    specs = [dg.AssetSpec("a", deps=["x"], skippable=True), dg.AssetSpec("b", deps=["a", "y"], skippable=True)]

    @dg.multi_asset(specs=specs, can_subset=True, check_specs=[dg.AssetCheckSpec("good", asset="b")])
    def both(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        seen.append(inputs_of_step(context.op_execution_context))
        yield from (dg.MaterializeResult(asset_key=key) for key in sorted(context.selected_asset_keys))
        for key in context.selected_asset_check_keys:
            yield dg.AssetCheckResult(passed=True, asset_key=key.asset_key, check_name=key.name)

    def read(*names: str) -> set[str]:
        selection = dg.AssetSelection.assets(*names).without_checks()
        dg.materialize([both], selection=selection, instance=instance)
        return {name.removeprefix("data version of ") for name in seen.pop() if name.startswith("data version")}

    seen.clear()
    with dg.DagsterInstance.ephemeral() as instance:
        for name in ("a", "b", "x", "y"):
            instance.report_runless_asset_event(dg.AssetMaterialization(name))
        assert read("a", "b") == {"x", "y"}
        assert read("a") == {"x"}
        assert read("b") == {"a", "y"}
        for _ in range(2):
            dg.materialize(
                [both],
                selection=dg.AssetSelection.checks(dg.AssetCheckKey(dg.AssetKey("b"), "good")),
                instance=instance,
            )
            assert seen[-1]["checks"] == {"b": ["good"]}
            instance.report_runless_asset_event(dg.AssetMaterialization("b"))
    assert seen[0]["data version of b"] != seen[1]["data version of b"]


def test_a_partition_that_depends_on_former_ones_does_not_read_those_of_its_own_run() -> None:
    days = dg.DailyPartitionsDefinition("2013-01-01", end_date="2013-01-05")
    before = dg.AssetDep("total", partition_mapping=dg.TimeWindowPartitionMapping(start_offset=-1, end_offset=-1))

    @dg.asset(partitions_def=days, deps=[before], backfill_policy=dg.BackfillPolicy.single_run())
    def total(context: dg.AssetExecutionContext) -> None:
        seen.append(inputs_of_step(context.op_execution_context)["data version of total"])

    seen.clear()
    tags = {"dagster/asset_partition_range_start": "2013-01-02", "dagster/asset_partition_range_end": "2013-01-03"}
    with dg.DagsterInstance.ephemeral() as instance:
        instance.report_runless_asset_event(dg.AssetMaterialization("total", partition="2013-01-01"))
        for _ in range(2):
            dg.materialize([total], tags=tags, instance=instance)
    assert seen[0].keys() == {"2013-01-01"}
    assert seen[0] == seen[1]


def test_the_task_of_an_array_reads_its_own_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of assets with the same partitions; what is mapped to others is read by all tasks."""
    monkeypatch.setattr(history, "MOST_PARTITIONS", 1)  # several questions for two records
    all_of_it, at_once = dg.AllPartitionMapping(), dg.BackfillPolicy.single_run()
    other = dg.asset(name="other", partitions_def=months)(lambda: None)
    tasks = [Task("1..2", ["1", "2"]), Task("3", ["3"])]
    found: list[tuple[Task, ...]] = []

    @dg.asset(
        deps=[monthly, observed, dg.AssetDep(other, partition_mapping=all_of_it)],
        partitions_def=months,
        backfill_policy=at_once,
    )
    def reader(context: dg.AssetExecutionContext) -> None:
        found.append(with_versions(context.op_execution_context, tasks))
        seen.append(inputs_of_step(context.op_execution_context, by_partition=True))

    def read() -> list[list[str]]:
        partitions = {"dagster/asset_partition_range_start": "1", "dagster/asset_partition_range_end": "3"}
        dg.materialize([reader, monthly, other, observed], selection=[reader], tags=partitions, instance=instance)
        return [[each for versions in task.reads.values() for each in versions] for task in found[-1]]

    with dg.DagsterInstance.ephemeral() as instance:
        assert read() == [[], []]
        assert [task.id for task in found[0]] == [task.id for task in tasks]
        for month, version in (("1", "a"), ("2", "b"), ("1", "c")):
            dg.materialize([monthly], partition_key=month, tags={"version": version}, instance=instance)
        dg.materialize([other], partition_key="3", instance=instance)
        assert read() == [["monthly c", "monthly b"], []]
        ids = [[task.id for task in each] for each in found]
        assert ids[0][0] != ids[1][0]
        assert ids[0][1] == ids[1][1]
        assert [name for name in seen[-1] if name.startswith("data version")] == ["data version of other"]


@pytest.mark.parametrize(
    ("definition", "key", "window"),
    [
        (dg.DailyPartitionsDefinition("2013-01-01"), "2013-01-01", ["2013-01-01T00:00", "2013-01-02T00:00"]),
        (
            dg.DailyPartitionsDefinition("2013-01-01", hour_offset=6),
            "2013-01-01",
            ["2013-01-01T06:00", "2013-01-02T06:00"],
        ),
        (dg.StaticPartitionsDefinition(["a"]), "a", None),
        (None, None, None),
    ],
)
def test_the_time_of_a_partition_is_an_input(
    definition: dg.PartitionsDefinition | None, key: str | None, window: list[str] | None
) -> None:
    @dg.asset(partitions_def=definition)
    def probe(context: dg.AssetExecutionContext) -> None:
        seen.append(inputs_of_step(context.op_execution_context))

    seen.clear()
    dg.materialize([probe], partition_key=key)
    [found] = seen
    assert found.pop("assets") == ["probe"]
    times = found.pop("time window of the partitions", None)
    assert times == (window and [f"{time}:00+00:00" for time in window])
    assert not found


def test_ops_wait_for_each_other_without_values_too() -> None:
    @dg.op
    def first() -> None: ...

    @dg.op(ins={"start": dg.In(dg.Nothing)})
    def second(context: dg.OpExecutionContext) -> None:
        seen.append(inputs_of_step(context))

    @dg.graph
    def inner() -> None:
        second(start=first())

    @dg.job
    def outer() -> None:
        inner()

    seen.clear()
    result = outer.execute_in_process()
    assert seen == [{"assets": [], "upstream step inner.first": result.run_id}]


def test_an_asset_check_waits_for_its_asset() -> None:
    @dg.asset_check(asset=files)
    def check(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        seen.append(inputs_of_step(context.op_execution_context))
        return dg.AssetCheckResult(passed=True)

    seen.clear()
    job = dg.define_asset_job("all", executor_def=dg.in_process_executor)
    dg.Definitions([files], asset_checks=[check], jobs=[job]).resolve_job_def("all").execute_in_process()
    [found] = seen
    assert found.pop("data version of files")
    assert found == {"assets": [], "checks": {"files": ["check"]}}
