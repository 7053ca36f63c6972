"""One number of cores: what was requested, what Slurm's variables say, what Ray has, and what the workload sees."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dagster_sbatch.launchers import Launcher, ScriptLauncher
from dagster_sbatch.slurm import SlurmRequest
from slurm_in_a_box import SimulatedSite
from support.background import Background
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


@dataclass(frozen=True)
class Case:
    """A request, and what its job has on each node: cores, and GiB of memory if that is checked."""

    request: dict[str, Any]
    cores: int
    memory: int | None = None


RAY_CASES = (
    Case({"gpus_per_node": 1}, 44, 180),
    Case({"gpus_per_node": 4, "nodes": 2}, 176, 720),
    Case({"gpus_per_node": 4, "exclusive": True}, 176),
    Case({"cpus_per_task": 3, "mem_per_cpu": "1G"}, 3, 3),
)
SCRIPT_CASES = (Case({"cpus_per_task": 2, "mem": "1G"}, 2), Case({"exclusive": True}, 190), Case({}, 1))


def run_all(
    site: SimulatedSite, text: str, folder: Path, launcher: Launcher, cases: Sequence[Case]
) -> list[dict[str, Any]]:
    """Run a workload with all requests at once; check what Slurm has given to each job, and return the reports."""
    workload = folder / "workload.py"
    workload.write_text(text)
    requests = [SlurmRequest(time_limit="5", **case.request) for case in cases]
    runs = [Background(partial(materialize, workload, folder, launcher=launcher, request=each)) for each in requests]
    reports = []
    for run, wanted, case in zip(runs, requests, cases, strict=True):
        outcome = run.outcome(240)
        assert outcome.error == "", case
        (metadata,) = outcome.materializations[None]
        row = site.squeue("--noheader", "--states=all", f"--jobs={metadata['job_id']}", "--format=%C %D %h").split()
        hardware_threads = 2 * case.cores * wanted.nodes
        assert row == [str(hardware_threads), str(wanted.nodes), "NO" if wanted.exclusive else "OK"], case
        reports.append(metadata)
    return reports


def test_ray_has_the_cores_and_the_memory_that_were_requested(site: SimulatedSite, workloads: Path) -> None:
    for found, case in zip(run_all(site, RAY, workloads, NO_DASHBOARD, RAY_CASES), RAY_CASES, strict=True):
        nodes, gpus, cores = case.request.get("nodes", 1), case.request.get("gpus_per_node", 0), str(case.cores)
        assert (found["cpus"], found["gpus"]) == (nodes * case.cores, nodes * gpus), case
        assert case.memory is None or found["memory"] == pytest.approx(nodes * case.memory, rel=0.01), case
        for place in ("job", "task"):
            seen = found[place]
            assert (seen["SLURM_CPUS_ON_NODE"], seen["SLURM_CPUS_PER_TASK"]) == (cores, cores), (case, place)
            assert seen["SLURM_JOB_CPUS_PER_NODE"] == (f"{cores}(x{nodes})" if nodes > 1 else cores), (case, place)
        assert found["task"]["OMP_NUM_THREADS"] == "3", case


def test_a_script_sees_the_cores_that_were_requested(site: SimulatedSite, workloads: Path) -> None:
    for found, case in zip(run_all(site, SCRIPT, workloads, ScriptLauncher(), SCRIPT_CASES), SCRIPT_CASES, strict=True):
        seen, cores = found["job"], str(case.cores)
        assert (seen["SLURM_CPUS_ON_NODE"], seen["SLURM_JOB_CPUS_PER_NODE"]) == (cores, cores), case
        assert seen["SLURM_CPUS_PER_TASK"] in ("", cores), case
        assert seen["OMP_NUM_THREADS"] == cores, case
