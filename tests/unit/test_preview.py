"""The plan of an asset, worked out offline."""

from pathlib import Path

import dagster as dg
import pytest

from resources import SUPERCOMPUTER_SITE_OVERRIDES
from resources.compute import ComputeResource
from resources.errors import ConfigurationError
from resources.launchers import RayLauncher, ScriptLauncher
from resources.preview import Preview, preview_asset
from resources.slurm import SlurmRequest

GPU = "zen4_0768_h100x4"


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


def preview(asset: str, partition: str | None = None) -> Preview:
    """With this one site, whatever others there are."""
    compute = ComputeResource(site_overrides={"musica": SUPERCOMPUTER_SITE_OVERRIDES["musica"]})
    return preview_asset([counts, sweep], {"compute": compute}, asset, partition)


def test_the_sweep_goes_to_the_gpu_partition() -> None:
    shown = preview("sweep")
    request = shown.plan.allocation.request
    assert (request.partition, request.qos, request.nodes, request.gpus_per_node) == (GPU, GPU, 2, 4)
    assert "16.00 GPU-hours" in shown.summary["time limit"]
    assert "ulimit -n 65536" in shown.script
    assert "#SBATCH --gres=gpu:4" in shown.script


def test_a_cpu_asset_leaves_the_gpu_partition_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PARTITION", GPU)
    monkeypatch.setenv("SLURM_QOS", f"dev_{GPU}")
    request = preview("counts", "2013-01").plan.allocation.request
    assert (request.partition, request.qos) == ("zen4_0768", "dev_zen4_0768")


@pytest.mark.parametrize(
    ("asset", "partition", "text"),
    [
        ("conuts", None, "did you mean 'counts'"),
        ("counts", None, "give --partition; valid are 2013-01 to 2013-12"),
        ("counts", "2014-01", "'2014-01' is not a partition"),
        ("sweep", "2013-01", "leave --partition out"),
    ],
)
def test_mistakes_are_named(asset: str, partition: str | None, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        preview(asset, partition)
