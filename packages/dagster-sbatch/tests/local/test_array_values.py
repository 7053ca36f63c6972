"""After a failed task: the values that an asset gets from an IO manager and returns for one; what is left as it was."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch import ComputeResource, JobArray
from dagster_sbatch.run import compute
from resources import PROJECT
from support.array_asset import DAYS, ArrayAsset

pytestmark = [pytest.mark.local, pytest.mark.usefixtures("data_root")]

FIRST, LAST = "2013-01-01", "2013-01-03"
KEYS = [FIRST, "2013-01-02", LAST]
LAST_FAILS = """
import os, pathlib
key, factor = pipes.partition_key, pipes.extras["factor"]
if key == "2013-01-03" and not pathlib.Path(os.environ["DATA_ROOT"], "fixed").exists():
    raise ValueError
pipes.report_custom_message({key: factor})
pipes.report_asset_materialization({"factor": factor})
"""


class ValueAsset(ArrayAsset):
    """Passes a value on to its tasks, and returns one that is made of their reports, for the IO manager."""

    def __init__(self, folder: Path, *, declared: bool) -> None:
        """`declared`: whether its function is annotated with the type of its value."""
        super().__init__(folder, LAST_FAILS, JobArray())
        self.values: dict[str, Any] = {"factor": 1}
        self.declared, self.makes_value = declared, True

    def definitions(self) -> dg.Definitions:
        values = self.values

        class Values(dg.IOManager):
            def handle_output(self, context: dg.OutputContext, obj: object) -> None:
                values["probe"] = obj

            def load_input(self, _: dg.InputContext) -> object:
                return values["factor"]

        policy = dg.BackfillPolicy.single_run()

        @dg.asset(
            partitions_def=DAYS,
            backfill_policy=policy,
            dagster_type=dg.PythonObjectDagsterType(dict) if self.declared else None,
        )
        def probe(context: dg.AssetExecutionContext, compute: ComputeResource, factor: int) -> Any:
            workload = self._folder / "workloads" / "workload.py"
            done = compute.run(context, workload=workload, array=self.array, extras={"factor": factor}, **self.call)
            result = done.get_materialize_result()
            if not self.makes_value:
                return result
            value = {key: number for each in done.get_custom_messages() for key, number in each.items()}
            return dg.MaterializeResult(value=value, metadata=result.metadata)

        job = dg.define_asset_job("all", selection="probe", executor_def=dg.in_process_executor)
        resources = {"compute": ComputeResource.of(PROJECT), "io_manager": Values()}
        return dg.Definitions(assets=[dg.AssetSpec("factor"), probe], jobs=[job], resources=resources)


def test_a_stored_partition_is_computed_again_if_there_is_a_newer_value(tmp_path: Path, data_root: Path) -> None:
    """Otherwise the end of the step would store the older result once more, as one of the newer value."""
    asset = ValueAsset(tmp_path, declared=False)
    asset.makes_value = False
    first = asset.run(FIRST, LAST)
    asset.values["factor"] = 2
    with dg.DagsterInstance.from_config(str(tmp_path / "dagster")) as instance:
        instance.report_runless_asset_event(dg.AssetMaterialization("factor"))
    (data_root / "fixed").touch()
    resumed = asset.run(FIRST, LAST, of=first.run_id, from_failure=True)
    assert {key: each["factor"] for key, each in resumed.once.items()} == dict.fromkeys(KEYS, 2)


@pytest.mark.parametrize("declared", [True, False])
def test_a_value_of_all_partitions_lacks_none(tmp_path: Path, data_root: Path, *, declared: bool) -> None:
    """A partition that is stored before the end of the step has no value, and what its task reported is not kept."""
    asset = ValueAsset(tmp_path, declared=declared)
    first = asset.run(FIRST, LAST)
    assert len(first.metadata) == (0 if declared else 2)
    (data_root / "fixed").touch()
    resumed = asset.run(FIRST, LAST, of=first.run_id, from_failure=True)
    assert resumed.success is declared
    assert asset.values.get("probe") == (dict.fromkeys(KEYS, 1) if declared else None)
    assert declared or "Earlier runs have completed 2 partitions of this run" in resumed.error


def test_what_an_older_engine_has_stored_is_not_computed_again(
    tmp_path: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has tagged its run with the deployment only."""

    def tag(context: dg.OpExecutionContext, deployment: str, *_: object) -> None:
        context.instance.add_run_tags(context.run_id, {"deployment": deployment})

    workload = """
import os, pathlib
computed = pathlib.Path(os.environ["DATA_ROOT"], pipes.partition_key)
with computed.open("a") as file:
    file.write("once ")
if pipes.partition_key == "2013-01-03" and len(computed.read_text()) == 5:
    raise ValueError
"""
    asset = ArrayAsset(tmp_path, workload, JobArray())
    with monkeypatch.context() as older:
        older.setattr(compute, "tag_deployment", tag)
        first = asset.run(FIRST, LAST)
    assert asset.run(FIRST, LAST, of=first.run_id, from_failure=True).success
    assert [(data_root / key).read_text() for key in KEYS] == ["once ", "once ", "once once "]
