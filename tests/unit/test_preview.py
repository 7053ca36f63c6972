"""The plan of an asset, worked out offline."""

import pytest

from musica_pipelines.definitions import assets
from resources import build_resources
from resources.errors import ConfigurationError
from resources.preview import Preview, preview_asset

GPU = "zen4_0768_h100x4"


def preview(asset: str, partition: str | None = None) -> Preview:
    return preview_asset(assets, build_resources(), asset, partition)


def test_the_sweep_goes_to_the_gpu_partition() -> None:
    shown = preview("delay_sweep")
    request = shown.plan.allocation.request
    assert (request.partition, request.qos, request.nodes, request.gpus_per_node) == (GPU, GPU, 2, 4)
    assert "16.00 GPU-hours" in shown.summary["time limit"]
    assert "ulimit -n 65536" in shown.script
    assert "#SBATCH --gres=gpu:4" in shown.script


def test_a_cpu_asset_leaves_the_gpu_partition_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PARTITION", GPU)
    monkeypatch.setenv("SLURM_QOS", f"dev_{GPU}")
    request = preview("flights", "2013-01").plan.allocation.request
    assert (request.partition, request.qos) == ("zen4_0768", "dev_zen4_0768")


@pytest.mark.parametrize(
    ("asset", "partition", "text"),
    [
        ("flihts", None, "did you mean 'flights'"),
        ("flights", None, "give --partition; valid are 2013-01 to 2013-12"),
        ("flights", "2014-01", "'2014-01' is not a partition"),
        ("delay_sweep", "2013-01", "leave --partition out"),
    ],
)
def test_mistakes_are_named(asset: str, partition: str | None, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        preview(asset, partition)
