"""One number of cores: what was requested, what Slurm's variables say, what Ray has, and what the workload sees."""

from pathlib import Path
from typing import Any

import pytest

from dagster_sbatch.launchers import Launcher, ScriptLauncher
from dagster_sbatch.slurm import SlurmRequest
from slurm_in_a_box import SimulatedSite
from support.ray_run import NO_DASHBOARD
from support.workload_asset import PIPES, materialize

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("on_supercomputer")]

SEES = (
    PIPES
    + """
    import os
    names = ("SLURM_CPUS_ON_NODE", "SLURM_CPUS_PER_TASK", "SLURM_JOB_CPUS_PER_NODE", "OMP_NUM_THREADS")
    def seen():
        return {"raw_value": {name: os.environ.get(name, "") for name in names}, "type": "json"}
    found = {"job": seen()}
"""
)
SCRIPT = SEES + "    pipes.report_asset_materialization(metadata=found)\n"
RAY = (
    SEES
    + """
    import ray
    ray.init(log_to_driver=False, logging_level="ERROR")
    total = ray.cluster_resources()
    found["task"] = ray.get(ray.remote(num_cpus=3)(seen).remote())
    memory = (total["memory"] + total["object_store_memory"]) / 2**30
    found |= {"cpus": total["CPU"], "gpus": total.get("GPU", 0), "memory": memory}
    pipes.report_asset_materialization(metadata=found)
"""
)


def run(
    site: SimulatedSite, workload: str, folder: Path, launcher: Launcher, request: dict[str, Any], cores: int
) -> dict[str, Any]:
    """Run a workload; check what Slurm has given to its job, and return what it has reported."""
    wanted = SlurmRequest(time_limit="5", **request)
    outcome = materialize(workload, folder, launcher=launcher, request=wanted)
    assert outcome.error == ""
    (metadata,) = outcome.materializations[None]
    row = site.squeue("--noheader", "--states=all", f"--jobs={metadata['job_id']}", "--format=%C %D %h").split()
    hardware_threads = 2 * cores * wanted.nodes
    assert row == [str(hardware_threads), str(wanted.nodes), "NO" if wanted.exclusive else "OK"]
    return metadata


@pytest.mark.parametrize(
    ("request_", "cores", "memory"),
    [
        ({"gpus_per_node": 1}, 44, 180),
        ({"gpus_per_node": 2}, 88, 360),
        ({"gpus_per_node": 4}, 176, 720),
        ({"gpus_per_node": 4, "nodes": 2}, 176, 720),
        ({"gpus_per_node": 4, "exclusive": True}, 176, None),
        ({"cpus_per_task": 3, "mem_per_cpu": "1G"}, 3, 3),
    ],
)
def test_ray_has_the_cores_and_the_memory_that_were_requested(
    request_: dict[str, Any], cores: int, memory: int | None, site: SimulatedSite, workloads: Path
) -> None:
    nodes, gpus = request_.get("nodes", 1), request_.get("gpus_per_node", 0)
    found = run(site, RAY, workloads, NO_DASHBOARD, request_, cores)
    assert (found["cpus"], found["gpus"]) == (nodes * cores, nodes * gpus)
    assert memory is None or found["memory"] == pytest.approx(nodes * memory, rel=0.01)
    for place in ("job", "task"):
        seen = found[place]
        assert (seen["SLURM_CPUS_ON_NODE"], seen["SLURM_CPUS_PER_TASK"]) == (str(cores), str(cores)), place
        assert seen["SLURM_JOB_CPUS_PER_NODE"] == (f"{cores}(x{nodes})" if nodes > 1 else str(cores)), place
    assert found["task"]["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    ("request_", "cores"), [({"cpus_per_task": 2, "mem": "1G"}, 2), ({"exclusive": True}, 190), ({}, 1)]
)
def test_a_script_sees_the_cores_that_were_requested(
    request_: dict[str, Any], cores: int, site: SimulatedSite, workloads: Path
) -> None:
    seen = run(site, SCRIPT, workloads, ScriptLauncher(), request_, cores)["job"]
    assert (seen["SLURM_CPUS_ON_NODE"], seen["SLURM_JOB_CPUS_PER_NODE"]) == (str(cores), str(cores))
    assert seen["SLURM_CPUS_PER_TASK"] in ("", str(cores))
    assert seen["OMP_NUM_THREADS"] == str(cores)
