"""What a step returns: checks that its workload does not report, and values beside what it reports."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch import FakeCompute, JobArray, ScriptLauncher
from dagster_sbatch.run.compute import ComputeResource
from resources import PROJECT
from support.workload_asset import PIPES, materialize

pytestmark = pytest.mark.local

COMPUTE = {"compute": ComputeResource.of(PROJECT)}
KEYS = dg.StaticPartitionsDefinition(["a"])
RAW = """
import json, os
from dagster_pipes import decode_param, open_dagster_pipes
def report(method, **params):
    with open(decode_param(os.environ["DAGSTER_PIPES_MESSAGES"])["path"], "a") as file:
        print(json.dumps({"method": method, "params": params}), file=file)
with open_dagster_pipes():
"""
"""The beginning of a workload whose reports dagster_pipes does not see, as those of programs in other languages."""
MISSING = "The workload has not reported these asset checks: new of probe. "


def run(asset: dg.AssetsDefinition) -> tuple[bool, list[str]]:
    """Materialize the asset; return whether that succeeded, the lines of the log, and the texts of failures."""
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([asset], resources=COMPUTE, partition_key="a", raise_on_error=False, instance=instance)
        failures = [event.event_specific_data.error.message for event in result.get_step_failure_events()]  # type: ignore[union-attr]
        return result.success, [*(entry.user_message for entry in instance.all_logs(result.run_id)), *failures]


@pytest.mark.parametrize("array", [None, JobArray()])
@pytest.mark.parametrize("reports", [True, False])
@pytest.mark.parametrize("returns", [True, False])
def test_a_declared_check_that_is_not_reported_is_named(
    *, array: JobArray | None, reports: bool, returns: bool, tmp_path: Path
) -> None:
    """Dagster stores the asset, fails the step, and says that it has not returned what it has returned."""
    workload = tmp_path / "probe.py"
    report = "pipes.report_asset_check('new', passed=True)" if reports else "pass"
    workload.write_text(f"{PIPES}    pipes.report_asset_check('old', passed=True)\n    {report}\n")
    checks = [dg.AssetCheckSpec(name, asset="probe") for name in ("old", "new")]

    @dg.asset(check_specs=checks, partitions_def=KEYS)
    def probe(context: dg.AssetExecutionContext, compute: ComputeResource) -> Iterator[Any]:
        done = compute.run(context, workload=workload, launcher=ScriptLauncher(), array=array)
        yield done.get_materialize_result()
        if returns:
            yield dg.AssetCheckResult(check_name="new", passed=True)

    success, log = run(probe)
    assert success is (reports is not returns)
    assert any(line.startswith(MISSING) for line in log) is not reports


@pytest.mark.parametrize("array", [None, JobArray()])
@pytest.mark.parametrize("check", [True, False])
def test_what_is_reported_twice_stores_nothing(*, check: bool, array: JobArray | None, tmp_path: Path) -> None:
    """Dagster stores the asset and refuses the second report; of the reports of a task, the last one counted."""
    folder, name = tmp_path, "The check good of probe" if check else "The asset probe"
    report = "report('report_asset_materialization', asset_key='probe', data_version=None, metadata={})"
    if check:
        report = "report('report_asset_check', asset_key='probe', check_name='good', passed=each > 0, metadata={})"
    (folder / "probe.py").write_text(f"{RAW}    for each in range(3):\n        {report}\n")

    @dg.asset(check_specs=[dg.AssetCheckSpec("good", asset="probe")], partitions_def=KEYS)
    def probe(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        done = compute.run(context, workload=folder / "probe.py", launcher=ScriptLauncher(), array=array)
        return done.get_materialize_result()

    success, log = run(probe)
    assert not success
    assert [line for line in log if line.startswith("Materialized")] == []
    assert any(f"{name} has been reported 3 times. Report all of it in one call." in line for line in log)


@pytest.mark.parametrize("compute", [COMPUTE["compute"], FakeCompute()], ids=["real", "fake"])
@pytest.mark.parametrize("array", [None, JobArray()])
@pytest.mark.parametrize("reports", [True, False])
def test_assets_come_after_those_that_they_depend_on(
    *, compute: ComputeResource, array: JobArray | None, reports: bool, tmp_path: Path
) -> None:
    """In whatever order a workload reports them; Dagster refuses any other order, after the job."""
    names = "fedcba"
    workload = tmp_path / "probe.py"
    lines = [f"    pipes.report_asset_materialization(asset_key={name!r})\n" for name in names if reports]
    workload.write_text("".join([PIPES, *lines, "    pass\n"]))
    specs = [dg.AssetSpec(name, deps=[*below]) for name, below in zip(names, [*names[1:], ""], strict=True)]

    @dg.multi_asset(specs=specs, partitions_def=KEYS)
    def chain(context: dg.AssetExecutionContext, compute: ComputeResource) -> Iterator[Any]:
        yield from compute.run(context, workload=workload, launcher=ScriptLauncher(), array=array).get_results()

    result = dg.materialize([chain], resources={"compute": compute}, partition_key="a")
    stored = [event.asset_key for event in result.get_asset_materialization_events()]
    assert [key and key.to_user_string() for key in stored] == sorted(names)


def test_a_value_for_the_io_manager_beside_what_the_workload_reports(tmp_path: Path) -> None:
    """As docs/assets.md has it, in an asset and in an op of a graph."""
    workload = tmp_path / "probe.py"
    workload.write_text(
        f"{PIPES}    pipes.report_custom_message(42)\n    pipes.report_asset_materialization(metadata={{'rows': 3}})\n"
    )

    @dg.asset
    def answer(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult[int]:
        done = compute.run(context, workload=workload, launcher=ScriptLauncher())
        value, metadata = done.get_custom_messages()[0], done.get_materialize_result().metadata
        return dg.MaterializeResult(value=value, metadata=metadata)

    @dg.op
    def half(context: dg.OpExecutionContext, compute: ComputeResource, whole: int) -> dg.Output[int]:
        compute.run(context, workload=workload, launcher=ScriptLauncher())
        return dg.Output(whole // 2)

    @dg.graph_asset
    def halved(answer: int) -> int:
        return half(answer)  # type: ignore[no-any-return]

    result = dg.materialize([answer, halved], resources=COMPUTE)
    assert result.output_for_node("answer") == 42
    assert result.output_for_node("halved.half") == 21
    (event,) = result.asset_materializations_for_node("answer")
    assert event.metadata["rows"] == dg.IntMetadataValue(3)


def test_a_table_with_a_loss_that_is_no_number_is_shown_whole(tmp_path: Path) -> None:
    """The UI reads each row, and JSON, as JSON, which knows neither NaN nor Infinity."""
    workload = (
        PIPES
        + """
    from math import inf, nan
    table = {"schema": [{"name": "loss", "type": "float"}], "records": [{"loss": 0.5}, {"loss": nan}]}
    best = {"raw_value": {"best": [inf, 1]}, "type": "json"}
    metadata = {"table": {"raw_value": table, "type": "table"}, "best": best, "losses": [nan], "loss": nan}
    pipes.report_asset_materialization(metadata=metadata)
    """
    )
    (found,) = materialize(workload, tmp_path).materializations[None]
    assert [record.data for record in found["table"].records] == [{"loss": 0.5}, {"loss": "nan"}]
    assert (found["best"], found["losses"]) == ({"best": ["inf", 1]}, ["nan"])
    assert math.isnan(found["loss"])  # a number still, which the plot leaves out


def test_a_report_on_an_asset_of_another_step_stores_nothing(tmp_path: Path) -> None:
    """The Pipes clients of other languages do not compare the key with those of the step."""
    workload = tmp_path / "probe.py"
    params: dict[str, Any] = {"asset_key": "other", "metadata": {}, "data_version": None}
    message = {"__dagster_pipes_version": "0.1", "method": "report_asset_materialization", "params": params}
    body = f"""
    import json, os
    from dagster_pipes import decode_param
    pipes.report_asset_materialization(asset_key="one")
    with open(decode_param(os.environ["DAGSTER_PIPES_MESSAGES"])["path"], "a") as file:
        file.write(json.dumps({message!r}) + "\\n")
    """
    workload.write_text(PIPES + body)

    @dg.multi_asset(specs=[dg.AssetSpec("one"), dg.AssetSpec("two")])
    def both(context: dg.AssetExecutionContext, compute: ComputeResource) -> Iterator[Any]:
        yield from compute.run(context, workload=workload, launcher=ScriptLauncher()).get_results()

    result = dg.materialize([both], resources=COMPUTE, raise_on_error=False)
    (failure,) = result.get_step_failure_events()
    assert (
        "probe.py reported cannot be used: a report on the asset 'other'; the assets of this run are one, two"
        in str(failure.step_failure_data.user_failure_data)
    )
    assert result.get_asset_materialization_events() == []


def test_only_the_op_that_makes_an_asset_of_a_graph_can_report_on_it(tmp_path: Path) -> None:
    """Dagster drops the reports of the others without a word; their step needs no result of the asset's checks."""
    workload = tmp_path / "probe.py"
    reports = [{"musica.partition": {"partition": "a", "metadata": {"rows": 3}}}] * 2
    lines = [f"pipes.report_custom_message({each})" for each in reports]
    workload.write_text(PIPES + "".join(f"    {line}\n" for line in [*lines, "pipes.report_asset_materialization()"]))

    @dg.op
    def first(context: dg.OpExecutionContext, compute: ComputeResource) -> dg.Output[int]:
        compute.run(context, workload=workload, launcher=ScriptLauncher())
        return dg.Output(1)

    @dg.op(out={"result": dg.Out(), "probe_new": dg.Out()})
    def last(context: dg.OpExecutionContext, compute: ComputeResource, start: int) -> Iterator[Any]:
        compute.run(context, workload=workload, launcher=ScriptLauncher())
        yield dg.Output(start, "result")
        yield dg.Output(dg.AssetCheckResult(passed=True), "probe_new")

    @dg.graph_asset(partitions_def=KEYS, check_specs=[dg.AssetCheckSpec("new", asset="probe")])
    def probe() -> Any:
        result, check = last(first())
        return {"result": result, "probe_new": check}

    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([probe], resources=COMPUTE, partition_key="a", instance=instance)
        found = [(each.step_key, each.user_message) for each in instance.all_logs(result.run_id)]
    (warned,) = [step for step, text in found if "another op makes this asset, so Dagster drops the report" in text]
    (missing,) = [step for step, text in found if text.startswith(MISSING)]
    assert (warned, missing) == ("probe.first", "probe.last")
    (event,) = result.asset_materializations_for_node("probe.last")
    assert event.metadata["rows"] == dg.IntMetadataValue(3)


def test_metadata_without_types_get_those_that_dagster_infers(tmp_path: Path) -> None:
    """As a program writes them that does not use dagster_pipes."""
    plain = {"rows": 7, "name": "x", "list": [1, math.inf]}
    report = f"report('report_asset_materialization', asset_key='probe', data_version=None, metadata={plain})"
    outcome = materialize(f"{RAW}    from math import inf\n    {report}\n", tmp_path)
    (found,) = outcome.materializations[None]
    assert {name: found[name] for name in plain} == {**plain, "list": [1, "inf"]}
