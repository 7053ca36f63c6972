"""What the sampler measures of real jobs, and that it ends with each of them."""

from pathlib import Path
from typing import Any

import pytest

from dagster_sbatch import JobArray
from dagster_sbatch.launchers import Launcher, ScriptLauncher, SrunLauncher
from dagster_sbatch.slurm import SlurmRequest
from slurm_in_a_box import GPU_PARTITION, SimulatedSite
from support.array_asset import DAYS, ArrayAsset
from support.background import MEASURED, Background
from support.ray_run import cause_of, nothing_is_left
from support.workload_asset import PIPES, Outcome, materialize

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("on_supercomputer")]
USES_GPU = "gpu = open(os.environ['DEVICES'] + '/nvidia' + os.environ['CUDA_VISIBLE_DEVICES'])"
BUSY = f"""{MEASURED}
{USES_GPU}
kept = b'x' * (200 << 20)
wait_until_measured(18, pause=0.05)
{PIPES}    pipes.report_asset_materialization()
"""
RANKS = f"""{MEASURED}
if os.environ['RANK'] == '1':
    kept = b'x' * (300 << 20)
wait_until_measured(12, pause=0.05)
{PIPES}    pipes.report_asset_materialization()
"""
FIRST, SECOND = DAYS.get_partition_keys()[:2]
TASKS = f"""{MEASURED}
if pipes.partition_key == "{FIRST}":
    {USES_GPU}
wait_until_measured(1)
pipes.report_asset_materialization()
"""
IDLE = f"import time\ntime.sleep(600)\n{PIPES}    pass\n"


def test_gpus_memory_and_cpu_time_of_jobs_are_measured(
    site: SimulatedSite, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a job on a GPU beside another job's, of one whose GPU is idle, of one on two nodes, of tasks of an array."""
    env = {"DEVICES": str(site.layout.run / "gpus")}

    def start(name: str, workload: str, launcher: Launcher, **request: Any) -> Background:
        folder = tmp_path / name
        folder.mkdir()
        wanted = SlurmRequest(**{"time_limit": "5", **request})
        return Background(lambda: materialize(workload, folder, launcher=launcher, request=wanted, env=env))

    gpu: dict[str, Any] = {"gpus_per_node": 1, "partition": GPU_PARTITION, "nodelist": "g4001"}
    gpu_of_task = SlurmRequest(**{**gpu, "time_limit": "5", "nodelist": "g4002"})
    two_nodes: dict[str, Any] = {"nodes": 2, "mem": "1G", "nodelist": "n4001,n4002"}
    idle = start("idle", IDLE, ScriptLauncher(), gpu_idle_limit="00:00:12", **gpu)
    busy = start("busy", BUSY, ScriptLauncher(), **gpu)
    ranks = start("ranks", RANKS, SrunLauncher(), **two_nodes)
    array = ArrayAsset(tmp_path / "array", TASKS, JobArray(), request=gpu_of_task, env=env).run(FIRST, SECOND)

    outcome = idle.outcome()
    assert not outcome.success
    assert "its GPU was idle for 00:00:12, and gpu_idle_limit='00:00:12' ends such a job" in cause_of(outcome.error)
    assert capfd.readouterr().err.count("The GPU of the job has been idle") == 1

    metadata = measured(busy.outcome())
    assert 0.4 < metadata["gpu_utilization"] <= 1  # nvidia-smi may have read it once before the workload opened it
    assert metadata["gpu_memory_max_mib"] >= 40512
    assert 200 < metadata["max_rss_mib"] < 400
    assert metadata["cpu_efficiency"] > 0
    assert metadata["usage"].startswith("GPU ")

    metadata = measured(ranks.outcome())
    assert 300 < metadata["max_rss_mib"] < 500
    assert "gpu_utilization" not in metadata

    assert array.error == ""
    assert array.once[FIRST]["gpu_utilization"] > 0.4
    assert (array.once[SECOND]["gpu_utilization"], "usage" in array.once[SECOND]) == (0, False)
    nothing_is_left(site, "g4001", "g4002", "n4001", "n4002")


def measured(outcome: Outcome) -> dict[str, Any]:
    assert outcome.error == ""
    (metadata,) = outcome.materializations[None]
    return metadata
