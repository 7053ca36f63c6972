"""The `compute` for unit tests, as docs/testing.md shows it."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch import FakeCompute, JobArray
from dagster_sbatch.launchers import RayLauncher, ScriptLauncher
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.slurm import SlurmRequest
from resources import PROJECT
from support import ROOT

WORKLOAD = Path(__file__)
months = dg.StaticPartitionsDefinition(["a", "b"])


@dg.asset(
    partitions_def=months, check_specs=[dg.AssetCheckSpec("full", asset="rows"), dg.AssetCheckSpec("new", asset="rows")]
)
def rows(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    return compute.run(
        context, workload=WORKLOAD, launcher=ScriptLauncher(), request=SlurmRequest(gpus_per_node=2),
        extras={"months": list(context.partition_keys)}, env={"A": "1"},
    ).get_materialize_result()  # fmt: skip


@dg.multi_asset(specs=[dg.AssetSpec("left"), dg.AssetSpec("right")])
def both(context: dg.AssetExecutionContext, compute: ComputeResource) -> Iterator[Any]:
    yield from compute.run(context, workload=WORKLOAD, launcher=RayLauncher()).get_results()


def materialize(asset: dg.AssetsDefinition, compute: FakeCompute, **options: Any) -> dg.ExecuteInProcessResult:
    return dg.materialize([asset], resources={"compute": compute}, raise_on_error=False, **options)


@pytest.fixture(autouse=True)
def of_another_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of whoever runs the tests do not matter, be they wrong."""
    monkeypatch.setenv("DAGSTER_DEPLOYMENT", "production_supercomputer")
    monkeypatch.setenv("SLURM_EDGE_NODE_PORT", "many")


def test_it_notes_the_calls_and_reports(tmp_path: Path) -> None:
    compute = FakeCompute(site_overrides=dict(PROJECT.site_overrides), metadata={"rows": 3}, failed_checks=["new"])
    result = materialize(rows, compute, partition_key="b")
    assert result.success
    (event,) = result.asset_materializations_for_node("rows")
    assert (event.metadata["rows"].value, event.partition) == (3, "b")
    assert {check.check_name: check.passed for check in result.get_asset_check_evaluations()} == {
        "full": True,
        "new": False,
    }
    (call,) = compute.calls
    assert call.plan.workload.path == WORKLOAD
    assert call.plan.allocation.request.partition == "zen4_0768_h100x4"
    assert (call.extras, call.plan.env) == ({"months": ["b"]}, {"A": "1"})


def test_each_has_its_own_calls() -> None:
    first, second = FakeCompute(), FakeCompute(metadata={"n": 1})
    assert materialize(both, first).success
    assert materialize(both, second).success
    assert [type(call.plan.launcher) for call in first.calls] == [RayLauncher]
    assert len(second.calls) == 1


def test_it_reports_every_asset_of_a_step() -> None:
    result = materialize(both, FakeCompute(metadata={"n": 1}))
    events = result.asset_materializations_for_node("both")
    assert {event.asset_key.to_user_string(): event.metadata["n"].value for event in events} == {"left": 1, "right": 1}


def test_metadata_may_be_what_json_cannot_say() -> None:
    day = datetime(2026, 1, 2, tzinfo=UTC)
    metadata = {"table": dg.MetadataValue.md("| a |"), "day": dg.MetadataValue.timestamp(day)}
    result = materialize(both, FakeCompute(metadata=metadata))
    assert result.success
    event, _ = result.asset_materializations_for_node("both")
    assert event.metadata == metadata


def test_each_task_of_an_array_reports(tmp_path: Path) -> None:
    @dg.asset(partitions_def=months, backfill_policy=dg.BackfillPolicy.single_run())
    def many(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        done = compute.run(context, workload=WORKLOAD, launcher=ScriptLauncher(), array=JobArray())
        return done.get_materialize_result()

    compute = FakeCompute(metadata={"n": 1})
    both_months = {"dagster/asset_partition_range_start": "a", "dagster/asset_partition_range_end": "b"}
    result = materialize(many, compute, tags=both_months)
    events = result.asset_materializations_for_node("many")
    assert {event.partition: event.metadata["n"].value for event in events} == {"a": 1, "b": 1}
    assert [task.name for task in compute.calls[0].plan.tasks] == ["a", "b"]


def test_the_page(tmp_path: Path) -> None:
    (tmp_path / "my_workload.py").touch()

    @dg.asset
    def my_asset(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        request = SlurmRequest(gpus_per_node=1)
        done = compute.run(context, workload=tmp_path / "my_workload.py", launcher=ScriptLauncher(), request=request)
        return done.get_materialize_result()

    (example,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "packages" / "dagster-sbatch" / "docs" / "testing.md").read_text(), re.DOTALL
    )
    own = "from musica_pipelines.assets.my_assets import my_asset\n"
    assert own in example
    names: dict[str, Any] = {"my_asset": my_asset}
    exec(example.replace(own, ""), names)
    names["test_my_asset"]()


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (SlurmRequest(gpus_per_node=5), "zen4_0768_h100x4"),
        (SlurmRequest(partition="zen5"), "is no partition of this site"),
    ],
)
def test_what_would_be_refused_is_refused(request_: SlurmRequest, text: str) -> None:
    @dg.asset
    def greedy(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        done = compute.run(context, workload=WORKLOAD, launcher=ScriptLauncher(), request=request_)
        return done.get_materialize_result()

    compute = FakeCompute(site_overrides=dict(PROJECT.site_overrides))
    result = materialize(greedy, compute)
    assert not result.success
    data = result.failure_data_for_node("greedy")
    assert data
    assert data.user_failure_data
    assert text in str(data.user_failure_data.description)
    assert compute.calls == []
