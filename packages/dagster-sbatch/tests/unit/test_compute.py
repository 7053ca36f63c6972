"""What `compute.run` says before it connects anywhere."""

from datetime import date
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch.launchers import ScriptLauncher
from dagster_sbatch.run.compute import ComputeResource
from resources import build_resources
from support import access


@pytest.mark.parametrize(
    ("deployment", "warned"), [("production_supercomputer", True), ("staging_supercomputer", False)]
)
def test_a_qos_for_tries_is_warned_about_in_production(
    deployment: str, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = access.environment("https://127.0.0.1:1", tmp_path)
    variables |= {"DAGSTER_DEPLOYMENT": deployment, "SLURM_QOS": "dev_zen4_0768"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "workload.py").write_text("")

    @dg.asset
    def probe(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        done = compute.run(context, workload=tmp_path / "workload.py", launcher=ScriptLauncher())
        return done.get_materialize_result()

    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([probe], resources=build_resources(), instance=instance, raise_on_error=False)
        said = [entry.user_message for entry in instance.all_logs(result.run_id)]
    assert not result.success  # nobody has access
    text = f"QoS dev_zen4_0768 is for short tests, and this is {deployment}. Check SLURM_QOS."
    assert (text in said) is warned


@pytest.mark.parametrize("partition", [None, "a"])
def test_an_asset_that_is_called_outside_a_run_says_how_to_run_it(partition: str | None) -> None:
    @dg.asset(partitions_def=dg.StaticPartitionsDefinition(["a"]) if partition else None)
    def probe(context: dg.AssetExecutionContext, compute: ComputeResource) -> None:
        compute.run(context, workload=__file__, launcher=ScriptLauncher())

    with dg.build_asset_context(partition_key=partition) as context, pytest.raises(dg.Failure) as error:
        probe(context, **build_resources())
    assert "compute.run: it was called outside a run" in str(error.value.description)
    assert "dg.materialize([asset], resources=" in str(error.value.description)


def test_the_context_of_something_else_is_refused() -> None:
    compute = build_resources()["compute"]
    with pytest.raises(dg.Failure) as error:
        compute.run(dg.build_sensor_context(), workload=__file__, launcher=ScriptLauncher())
    assert "compute.run: its context is a SensorEvaluationContext, and only an asset, an op or" in str(error.value)


@pytest.mark.parametrize(
    ("argument", "value", "text"),
    [
        ("launcher", ScriptLauncher, "launcher=ScriptLauncher is a class. Write launcher=ScriptLauncher()"),
        ("launcher", "ray", "launcher='ray' is not a launcher. Write for instance launcher=ScriptLauncher()"),
        ("request", {"nodes": 2}, "request={'nodes': 2} is not a SlurmRequest. Write for instance request="),
        ("request", {}, "request={} is not a SlurmRequest"),
        ("workload", None, "workload=None is not a path. Write for instance WORKLOADS / "),
        ("extras", ["trials", 3], "extras=['trials', 3] is not a dictionary"),
        ("extras", {1: 1, "two": 2}, "extras: the name 1 is not a string"),
        ("extras", {"x": {1: 1, "two": 2}}, "extras['x'] cannot be sent to the workload as JSON: a dictionary in"),
        ("extras", {"day": date(2013, 1, 7)}, "Object of type date is not JSON serializable. Convert it to"),
    ],
)
def test_an_argument_of_a_wrong_kind_says_what_to_write(argument: str, value: object, text: str) -> None:
    @dg.asset
    def probe(context: dg.AssetExecutionContext, compute: ComputeResource) -> None:
        arguments: dict[str, Any] = {"workload": __file__, "launcher": ScriptLauncher(), argument: value}
        compute.run(context, **arguments)

    with pytest.raises(dg.Failure) as error:
        dg.materialize([probe], resources=build_resources())
    assert text in str(error.value.description)
