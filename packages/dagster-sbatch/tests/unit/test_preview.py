"""The plan of an asset, worked out offline."""

import asyncio
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.inspect.asset_preview import NotPreviewedError, Preview, preview_asset
from dagster_sbatch.launchers import RayLauncher, ScriptLauncher
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.slurm import Retries, SlurmRequest
from resources import PROJECT

CPU, GPU = "zen4_0768", "zen4_0768_h100x4"


WORKLOAD = Path(__file__)
"""Any program that parses."""


@dg.asset(partitions_def=dg.MonthlyPartitionsDefinition(start_date="2013-01", end_date="2014-01", fmt="%Y-%m"))
def counts(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    request = SlurmRequest(cpus_per_task=2, time_limit="00:10:00")
    return compute.run(context, workload=WORKLOAD, launcher=ScriptLauncher(), request=request).get_materialize_result()


@dg.asset
def sweep(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    request = SlurmRequest(nodes=2, gpus_per_node=4, time_limit="02:00:00")
    return compute.run(context, workload=WORKLOAD, launcher=RayLauncher(), request=request).get_materialize_result()


class Wrapped(dg.ConfigurableResource[Any]):
    """A resource of one's own around the project's."""

    compute: ComputeResource

    def go(self, context: Any, **request: Any) -> dg.MaterializeResult:
        return run(context, self.compute, **request)


class Trials(dg.Config):
    trials: int


def run(context: Any, compute: ComputeResource, **request: Any) -> dg.MaterializeResult:
    wanted = SlurmRequest(**{"time_limit": "00:10:00", **request})
    return compute.run(context, workload=WORKLOAD, launcher=ScriptLauncher(), request=wanted).get_materialize_result()


@dg.asset
def generator(context: dg.AssetExecutionContext, compute: ComputeResource) -> Iterator[dg.MaterializeResult]:
    yield run(context, compute)


@dg.asset
async def coroutine(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    await asyncio.sleep(0)
    return run(context, compute)


@dg.asset
def nested(context: dg.AssetExecutionContext, wrapped: Wrapped) -> dg.MaterializeResult:
    return wrapped.go(context)


@dg.asset(required_resource_keys={"compute"})
def by_key(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    return run(context, context.resources.compute)


@dg.asset
def configured(context: dg.AssetExecutionContext, config: Trials, compute: ComputeResource) -> dg.MaterializeResult:
    return run(context, compute, nodes=config.trials)


@dg.asset
def catches(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    try:
        return run(context, compute)
    except Exception as error:
        raise dg.RetryRequested(seconds_to_wait=60) from error


@dg.asset
def of_a_run(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    print(f"run {context.run.run_id}")
    return run(context, compute)


@dg.asset
def takes_a_value(context: dg.AssetExecutionContext, compute: ComputeResource, generator: int) -> dg.MaterializeResult:
    return run(context, compute, nodes=generator)


class Loads(dg.IOManager):
    def load_input(self, context: dg.InputContext) -> int:
        return 3

    def handle_output(self, context: dg.OutputContext, obj: object) -> None:
        raise AssertionError((context, obj))


@dg.asset(ins={"generator": dg.AssetIn(input_manager_key="loads")})
def takes_a_value_that_is_there(
    context: dg.AssetExecutionContext, compute: ComputeResource, generator: int
) -> dg.MaterializeResult:
    return run(context, compute, nodes=generator)


@dg.op
def first(context: dg.OpExecutionContext, compute: ComputeResource) -> int:
    run(context, compute, nodes=1)
    return 1


@dg.op
def second(context: dg.OpExecutionContext, compute: ComputeResource) -> int:
    run(context, compute, nodes=2)
    return 2


@dg.op
def joined(one: int, two: int) -> int:
    return one + two


@dg.graph_asset
def graph() -> int:
    return joined(first(), second())  # type: ignore[no-any-return]


@dg.multi_asset(specs=[dg.AssetSpec("both_a"), dg.AssetSpec("both_b")])
def both(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    return run(context, compute, nodes=len(context.selected_asset_keys))


@dg.multi_asset(specs=[dg.AssetSpec("either_a"), dg.AssetSpec("either_b")], can_subset=True)
def either(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    return run(context, compute, nodes=len(context.selected_asset_keys))


@dg.asset(partitions_def=dg.DynamicPartitionsDefinition(name="stations"))
def dynamic(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    assert context.partition_key == "any"
    return run(context, compute)


SEVERAL = dg.MultiPartitionsDefinition(
    {"station": dg.DynamicPartitionsDefinition(name="stations"), "kind": dg.StaticPartitionsDefinition(["wet", "dry"])}
)


@dg.asset(partitions_def=SEVERAL)
def several(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    assert isinstance(context.partition_key, dg.MultiPartitionKey)
    assert context.partition_key.keys_by_dimension == {"station": "any", "kind": "wet"}
    return run(context, compute)


@dg.asset(partitions_def=dg.DailyPartitionsDefinition(start_date=datetime.now() + timedelta(days=400)))
def not_begun(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    return run(context, compute)


@dg.asset
def plain() -> None:
    raise AssertionError("preview runs no asset that submits nothing")


@dg.asset
def calls_nothing(compute: ComputeResource) -> None:
    assert compute


@dg.asset
def breaks(compute: ComputeResource) -> None:
    assert compute
    SlurmRequest(nodes=0)  # raises in the engine; the line to correct is this one


@dg.asset(required_resource_keys={"compute", "database"})
def needs_a_database() -> None: ...


@dg.resource
def database(_: object) -> None:
    raise RuntimeError("DATABASE_URL is not set")


@dg.asset
def too_large(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    return run(context, compute, gpus_per_node=4, cpus_per_task=177)


def previews(asset: str, partition: str | None = None, config: Mapping[str, Any] | None = None) -> list[Preview]:
    """With this one site, whatever others there are."""
    compute = ComputeResource.of(PROJECT)
    assets = dg.load_assets_from_modules([sys.modules[__name__]])
    resources = {"compute": compute, "wrapped": Wrapped(compute=compute), "database": database, "loads": Loads()}
    definitions = dg.Definitions(assets=[*assets, dg.AssetSpec("elsewhere")], resources=resources)
    return preview_asset(definitions, asset, partition, config)


def preview(asset: str, partition: str | None = None) -> Preview:
    (shown,) = previews(asset, partition)
    return shown


@pytest.mark.filterwarnings("ignore:InitResourceContext.dagster_run:DeprecationWarning")  # Dagster's own, for `nested`
@pytest.mark.parametrize(
    ("asset", "partition", "config", "nodes"),
    [
        ("generator", None, None, [1]),
        ("coroutine", None, None, [1]),
        ("nested", None, None, [1]),
        ("by_key", None, None, [1]),
        ("configured", None, {"ops": {"configured": {"config": {"trials": 5}}}}, [5]),
        ("catches", None, None, [1]),
        ("of_a_run", None, None, [1]),
        ("takes_a_value_that_is_there", None, None, [3]),
        ("graph", None, None, [1, 2]),
        ("both_a", None, None, [2]),
        ("either_b", None, None, [1]),
        ("dynamic", "any", None, [1]),
        ("several", "wet|any", None, [1]),
    ],
)
def test_every_kind_of_asset_is_shown(
    asset: str, partition: str | None, config: Any, nodes: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    shown = previews(asset, partition, config)
    assert sorted(each.plan.allocation.request.nodes for each in shown) == nodes
    assert all(each.summary["step"] for each in shown)
    out, err = capfd.readouterr()
    assert out == ""
    assert "STEP_FAILURE" not in err  # Dagster's own words would frighten


@pytest.mark.parametrize(
    ("asset", "partition", "texts"),
    [
        ("conuts", None, ["did you mean 'counts'"]),
        ("elsewhere", None, ["no code of this project makes it"]),
        ("counts", None, ["the asset is partitioned. Give --partition. Valid are 2013-01, 2013-02, "]),
        ("counts", "2014-01", ["'2014-01' is not a partition of the asset. Valid are "]),
        ("sweep", "2013-01", ["Leave --partition out"]),
        (
            "dynamic",
            None,
            ["Give --partition. Dynamic partitions are added while Dagster runs: any key of them can be previewed"],
        ),
        ("several", None, ["Give --partition"]),
        ("several", "dry", ["'dry' is not a partition of the asset. A key is kind|station. Dynamic"]),
        ("several", "moist|any", ["Valid are wet|any, dry|any"]),
        ("not_begun", None, ["has no partition yet: its first one begins at 20"]),
        ("configured", None, ["Give it with --config-json", 'Missing required config entry "ops"']),
        (
            "takes_a_value",
            None,
            ["gets the value of another asset from an IO manager", "Name it in `deps="],
        ),
        ("plain", None, ["none of its resources is a ComputeResource"]),
        ("calls_nothing", None, ["ran to its end without calling compute.run"]),
        ("breaks", None, ["own code, which failed before it called compute.run", "SlurmRequest", "test_preview.py"]),
        ("needs_a_database", None, ["one of its resources cannot be made here", "DATABASE_URL is not set"]),
        ("too_large", None, ["gives a job 176 CPUs"]),
    ],
)
def test_what_cannot_be_shown_says_why_and_what_to_do(asset: str, partition: str | None, texts: list[str]) -> None:
    with pytest.raises(ConfigurationError) as error:
        previews(asset, partition)
    for text in texts:
        assert text in str(error.value)


def test_a_request_that_no_run_could_make_is_an_error_of_the_asset() -> None:
    """For the doctor: it is not `ready` then."""
    with pytest.raises(ConfigurationError) as error:
        previews("breaks", None)
    assert not isinstance(error.value, NotPreviewedError)


def test_after_a_preview_runs_are_runs_again(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("from dagster_pipes import open_dagster_pipes\nwith open_dagster_pipes(): print('ran')\n")

    @dg.asset
    def runs(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        done = compute.run(context, workload=program, launcher=ScriptLauncher())
        return done.get_materialize_result()

    preview("sweep")
    assert dg.materialize([runs], resources={"compute": ComputeResource(site_overrides={})}).success


@pytest.mark.parametrize(
    ("gpus", "request_", "nodes", "per_node", "cost"),
    [
        (0, {"cpus_per_task": 2, "mem": "8G"}, "shared", "2 of 190 cores, 0 of 0 GPUs, memory 8G of", "0.01 node"),
        (1, {}, "shared", "44 of 176 cores, 1 of 4 GPUs, memory 180G of 768G", "0.25 node"),
        (1, {"cpus_per_task": 8, "mem": "700G"}, "shared", "8 of 176 cores, 1 of 4 GPUs, memory 700G", "0.91 node"),
        (4, {}, "not shared: all cores", "176 of 176 cores, 4 of 4 GPUs, memory 720G of 768G", None),
        (0, {}, "shared", "1 of 190 cores, 0 of 0 GPUs, Slurm's default memory (a node has 768G)", "0.01 node"),
        (0, {"exclusive": True}, "not shared: `exclusive`", "190 of 190 cores, 0 of 0 GPUs, memory all of 768G", None),
        (0, {"cpus_per_task": 2, "ntasks_per_node": 3, "mem_per_cpu": "64G"}, "3 tasks per node; shared",
         "6 of 190 cores, 0 of 0 GPUs, memory 64G per core of 768G", "0.50 node"),
    ],
)  # fmt: skip
def test_the_summary_says_what_is_requested_of_how_much_and_what_it_costs(
    gpus: int, request_: dict[str, Any], nodes: str, per_node: str, cost: str | None
) -> None:
    @dg.asset
    def asked(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        return run(context, compute, gpus_per_node=gpus, time_limit="01:00:00", **request_)

    compute = ComputeResource.of(PROJECT)
    (shown,) = preview_asset(dg.Definitions(assets=[asked], resources={"compute": compute}), "asked")
    assert shown.summary["where"].startswith("musica: partition ")
    assert nodes in shown.summary["nodes"]
    assert shown.summary["per node"].startswith(per_node)
    assert shown.summary["cost"].startswith("at most 1 node-hour" + (f" and {gpus} GPU-hour" if gpus else ""))
    assert ("GPU-hour" in shown.summary["cost"]) is bool(gpus)
    assert ("where shares of a node are charged" in shown.summary["cost"]) is (cost is not None)
    assert cost is None or cost in shown.summary["cost"]


def test_the_retries_are_shown_that_the_request_names() -> None:
    @dg.asset
    def asked(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        retries = Retries(max_mem="64G", max_time_limit="04:00:00", exclude_failed_nodes=True, max_retries=2)
        return run(context, compute, mem="16G", retries=retries)

    definitions = dg.Definitions(assets=[asked], resources={"compute": ComputeResource.of(PROJECT)})
    (shown,) = preview_asset(definitions, "asked")
    assert shown.summary["retries"] == (
        "at most 2, up to 64G of memory, up to 04:00:00 of time, without failed nodes; each adds to the cost"
    )
    assert "retries" not in preview("sweep").summary


def test_the_project_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "SBATCH_ACCOUNT of your login shell there, or your default" in preview("sweep").summary["project"]
    monkeypatch.setenv("SLURM_ACCOUNT", "p1")
    shown = preview("sweep")
    assert shown.summary["project"] == "p1"
    assert "#SBATCH --account=p1" in shown.script


def test_the_sweep_goes_to_the_gpu_partition() -> None:
    shown = preview("sweep")
    request = shown.plan.allocation.request
    assert (request.partition, request.qos, request.nodes, request.gpus_per_node) == (GPU, GPU, 2, 4)
    assert shown.summary["cost"] == "at most 4 node-hours and 16 GPU-hours"
    assert "ulimit -n 65536" in shown.script
    assert "#SBATCH --gres=gpu:4" in shown.script


def test_a_cpu_asset_leaves_the_gpu_partition_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PARTITION", GPU)
    monkeypatch.setenv("SLURM_QOS", f"dev_{GPU}")
    request = preview("counts", "2013-01").plan.allocation.request
    assert (request.partition, request.qos) == (CPU, f"dev_{CPU}")
