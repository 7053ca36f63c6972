"""What would be enough for an asset, from the numbers of its last jobs."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch.costs.proposal import Proposal, Use, propose, render
from dagster_sbatch.inspect.asset_preview import preview_asset
from dagster_sbatch.inspect.dry_run import try_script
from dagster_sbatch.launchers import ScriptLauncher
from dagster_sbatch.run.array_results import table
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.run.past_use import last_proposals, past_uses, proposal_metadata
from dagster_sbatch.slurm import SlurmRequest, allocate
from dagster_sbatch.slurm.accounting import count
from dagster_sbatch.slurm.gateway import JobEnd, Projects
from dagster_sbatch.slurm.retries import check_retries
from resources import PROJECT

SITE = PROJECT.load_site("musica")
CPU, GPU = "zen4_0768", "zen4_0768_h100x4"


def proposal(fields: dict[str, Any], *uses: dict[str, Any], **numbers: Any) -> Proposal | None:
    """Propose for a request after jobs of this size with some numbers."""
    request = SlurmRequest(**fields)
    allocation = allocate(request, SITE)
    return propose(request, allocation, [use(allocation.request, **each) for each in uses or [numbers]])


def use(planned: SlurmRequest, seconds: float = 1000, partition: str = "", **numbers: Any) -> Use:
    cpus = planned.nodes * planned.ntasks_per_node * (planned.cpus_per_task or 1)
    gpus = planned.nodes * planned.gpus_per_node
    return Use(str(planned.partition), partition, planned.nodes, gpus, cpus, seconds, **numbers)


GPUS = {"gpus_per_node": 4, "time_limit": "02:00:00"}
BUSY = {"gpu_utilization": 0.31, "cpu_efficiency": 0.1, "memory": 9000}


@pytest.mark.parametrize(
    ("fields", "numbers", "code"),
    [
        # time: half as much again, in steps of five minutes
        ({"time_limit": "02:00:00"}, {"seconds": 1330}, 'SlurmRequest(time_limit="00:35:00")'),
        ({"time_limit": "02:00:00"}, {"seconds": 4000}, ""),
        ({"time_limit": "00:05:00"}, {"seconds": 1}, ""),
        # memory: a quarter more, in GiB; of each task, if there are several
        ({"mem": "64G"}, {"seconds": 3000, "memory": 9 * 1024}, 'SlurmRequest(mem="12G")'),
        ({"mem": "64G"}, {"seconds": 3000, "memory": 50 * 1024}, ""),
        ({"mem": "64G", "ntasks_per_node": 4}, {"seconds": 3000, "memory": 9 * 1024},
         'SlurmRequest(ntasks_per_node=4, mem="45G")'),
        ({"mem": "64G", "ntasks_per_node": 4}, {"seconds": 3000, "memory": 40 * 1024}, ""),  # of all tasks: 64G at most
        ({"mem_per_cpu": "8G", "cpus_per_task": 2}, {"seconds": 3000, "memory": 1024},
         'SlurmRequest(cpus_per_task=2, mem="2G")'),
        ({"mem": "64G", "ntasks_per_node": 4}, {"seconds": 3000, "memory": 9 * 1024, "sampled": True},
         'SlurmRequest(ntasks_per_node=4, mem="12G")'),
        ({"exclusive": True, "mem": "64G"}, {"seconds": 3000, "memory": 1024}, ""),
        # more, where a job succeeded at a later attempt; the limits of the retries stay above it, or go
        ({"mem": "16G", "retries": {"max_mem": "64G"}}, {"seconds": 3000, "memory": 20 * 1024},
         'SlurmRequest(mem="25G", retries=Retries(max_mem="64G"))'),
        ({"mem": "16G", "retries": {"max_mem": "24G"}}, {"seconds": 3000, "memory": 20 * 1024},
         'SlurmRequest(mem="24G")'),
        ({"mem": "16G"}, {"seconds": 3000, "memory": 15 * 1024}, ""),
        ({"mem_per_cpu": "1G", "cpus_per_task": 8, "retries": {"max_mem": "4G"}}, {"seconds": 3000, "memory": 9 * 1024},
         'SlurmRequest(cpus_per_task=8, mem="12G", retries=Retries(max_mem="32G"))'),
        ({"time_limit": "00:30:00", "mem": "4G", "retries": {"max_time_limit": "01:30:00"}}, {"seconds": 2900},
         'SlurmRequest(mem="4G", time_limit="01:15:00", retries=Retries(max_time_limit="01:30:00"))'),
        ({"retries": {"max_time_limit": "01:30:00"}}, {"seconds": 4000}, 'SlurmRequest(time_limit="01:30:00")'),
        # but not more than a node has, and its QoS allows
        ({"mem": "400G", "retries": {"max_mem": "1T"}}, {"seconds": 3000, "memory": 700 * 1024},
         'SlurmRequest(mem="768G")'),
        ({"mem_per_cpu": "1G", "cpus_per_task": 190, "retries": {"max_mem": "8G"}},
         {"seconds": 3000, "memory": 700 * 1024}, 'SlurmRequest(cpus_per_task=190, mem="768G")'),
        ({"mem_per_cpu": "1G", "cpus_per_task": 100, "retries": {"max_mem": "16G"}},
         {"seconds": 3000, "memory": 120 * 1024},
         'SlurmRequest(cpus_per_task=100, mem="150G", retries=Retries(max_mem="768G"))'),
        ({"time_limit": "2-00", "retries": {"max_time_limit": "5-00"}}, {"seconds": 240_000},
         'SlurmRequest(time_limit="3-00:00:00", retries=Retries(max_time_limit="5-00:00:00"))'),
        ({}, {"seconds": 3000, "memory": 1024}, ""),  # Slurm decides: nobody knows what it gave
        # CPUs, with the memory that must not shrink with them, and the time that the job may take longer
        ({"cpus_per_task": 16, "mem": "4G", "time_limit": "02:00:00"}, {"cpu_efficiency": 0.1, "seconds": 1000},
         'SlurmRequest(cpus_per_task=2, mem="4G", time_limit="00:45:00")'),
        ({"cpus_per_task": 16, "mem_per_cpu": "1G", "time_limit": "00:45:00"},
         {"cpu_efficiency": 0.1, "memory": 14 * 1024},
         'SlurmRequest(cpus_per_task=2, mem="16G", time_limit="00:45:00")'),
        ({"cpus_per_task": 16, "time_limit": "01:00:00"}, {"cpu_efficiency": 0.1, "seconds": 2000}, ""),  # which mem?
        ({"cpus_per_task": 16, "mem": "4G", "time_limit": "00:40:00"}, {"cpu_efficiency": 0.1, "seconds": 1000},
         'SlurmRequest(cpus_per_task=16, mem="4G", time_limit="00:25:00")'),  # fewer CPUs would need 00:45:00
        ({"cpus_per_task": 4, "mem": "4G"}, {"cpu_efficiency": 0.7, "seconds": 2000}, ""),
        # GPUs, with the CPUs and the memory that come with them
        (GPUS, BUSY | {"seconds": 1000}, 'SlurmRequest(gpus_per_node=2, time_limit="00:45:00")'),
        (GPUS, BUSY | {"cpu_efficiency": 0.5}, 'SlurmRequest(gpus_per_node=3, time_limit="00:40:00")'),
        (GPUS, BUSY | {"memory": 500 * 1024}, 'SlurmRequest(gpus_per_node=4, time_limit="00:25:00")'),
        (GPUS | {"mem_per_cpu": "2G"}, BUSY | {"memory": 300 * 1024},  # the memory comes with the CPUs of the GPUs
         'SlurmRequest(gpus_per_node=4, mem_per_cpu="2G", time_limit="00:25:00")'),
        (GPUS, BUSY | {"cpu_efficiency": None}, 'SlurmRequest(gpus_per_node=4, time_limit="00:25:00")'),
        (GPUS | {"ntasks_per_node": 4}, BUSY,
         'SlurmRequest(ntasks_per_node=4, gpus_per_node=4, time_limit="00:25:00")'),
        (GPUS, BUSY | {"gpu_utilization": 0.0}, 'SlurmRequest(gpus_per_node=1, time_limit="00:25:00")'),
        (GPUS, {}, 'SlurmRequest(gpus_per_node=4, time_limit="00:25:00")'),
    ],
)  # fmt: skip
def test_a_proposal_contains_its_margin(fields: dict[str, Any], numbers: dict[str, Any], code: str) -> None:
    found = proposal(fields, **numbers)
    assert found
    assert found.code == code
    if found.request:
        check_retries(allocate(found.request, SITE).request)
    assert (found.request is None) is (not code)


def test_the_use_names_the_most_and_the_partitions_where_they_differ() -> None:
    many = [
        {"partition": "2013-01", "seconds": 600, "memory": 2048},
        {"partition": "2013-07", "seconds": 900, "memory": 9216, "cpu_efficiency": 0.123},
    ]
    found = proposal({"mem": "64G", "cpus_per_task": 4, "time_limit": "02:00:00"}, *many)
    assert found
    assert found.used == (
        "The last 2 jobs of this size used at most 00:15:00 of 02:00:00, 9.0 of 64.0 GiB per node "
        "(2013-07; least: 2.0 in 2013-01), 12% of 4 CPUs."
    )
    found = proposal({"gpus_per_node": 1, "cpus_per_task": 1}, cpu_efficiency=0.5, gpu_utilization=0.9)
    assert found
    assert found.used.endswith("50% of 1 CPU, 90% of 1 GPU.")
    found = proposal({}, memory=1024)
    assert found
    assert found.used == "The last job of this size used at most 00:16:40 of 01:00:00, 1.0 GiB per node."
    found = proposal(GPUS, **BUSY, gpu_memory=40960)
    assert found
    assert found.used.startswith("The last job of this size used at most 00:16:40 of 02:00:00, 8.8 of 720.0 GiB ")
    assert found.used.endswith("10% of 176 CPUs, 31% of 4 GPUs, 40.0 GiB of a GPU's memory.")


@pytest.mark.parametrize(
    "other", [{"slurm_partition": "fat"}, {"nodes": 2}, {"gpus": 1}, {"cpus": 5}]
)  # fmt: skip
def test_a_job_of_another_size_tells_nothing(other: dict[str, Any]) -> None:
    """After a proposal was followed, no smaller one is made from the same jobs."""
    allocation = allocate(SlurmRequest(cpus_per_task=4), SITE)
    same: dict[str, Any] = {"slurm_partition": CPU, "nodes": 1, "gpus": 0, "cpus": 4}
    found = [Use(**known, partition="", seconds=60) for known in (same, same | other)]
    for uses, known in ((found[:1], True), (found[1:], False), ([], False)):
        assert (propose(SlurmRequest(cpus_per_task=4), allocation, uses) is not None) is known


def test_the_code_of_a_request_makes_an_equal_one() -> None:
    request = SlurmRequest(
        nodes=2, time_limit="1-12", modules=["GCC/14.3.0"], exclusive=True, options=("--nice=5",), most_gpu_hours=3
    )
    assert eval(render(request), {"SlurmRequest": SlurmRequest}) == request
    assert render(SlurmRequest()) == "SlurmRequest()"


@pytest.mark.parametrize("lacking", ["elapsed_seconds", "node_hours", "cpu_hours"])
def test_numbers_that_are_missing_or_wrong_are_absent(lacking: str) -> None:
    request = SlurmRequest(nodes=2, cpus_per_task=3, gpus_per_node=1)
    rows = [["7", "COMPLETED", "2048K", "00:21"]]
    known = count(JobEnd(0, "COMPLETED", started=1000, ended=1007, rows=rows), request)
    assert Use.parse(known, GPU, "a") == Use(GPU, "a", 2, 2, 6, 7, memory=2, cpu_efficiency=0.5)
    for value in (None, "many", float("nan"), -1, True, 0):
        assert Use.parse({**known, lacking: value}, GPU, "a") is None
        odd = Use.parse({**known, "gpu_utilization": value}, GPU, "a")
        assert odd
        assert odd.gpu_utilization == (0 if value == 0 and value is not True else None)


@dg.asset
def sweep(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
    request = SlurmRequest(mem="64G", time_limit="02:00:00")
    done = compute.run(context, workload=Path(__file__), launcher=ScriptLauncher(), request=request)
    return done.get_materialize_result()


NUMBERS = {"partition": CPU, "elapsed_seconds": 1000.0, "node_hours": 0.277778, "cpu_hours": 0.277778}
"""Metadata of a job of one CPU."""


class Slurm:
    """Starts jobs of less than an hour at once, others some time later."""

    def __init__(self, later: int) -> None:
        self.later, self.now = later, 1700000000

    def test(self, script: str) -> tuple[bool, str]:
        self.now += 1
        start = self.now + (self.later if "--time=02:00:00" in script else 0)
        return True, f"sbatch: Job 1 to start at {start} using 19 processors"

    def ask(self, **_: Any) -> dict[str, Any]:
        """Find the environment."""
        return {}


def test_the_history_of_an_asset_becomes_a_proposal_in_the_preview_and_in_the_metadata() -> None:
    definitions = dg.Definitions([sweep], resources={"compute": ComputeResource.of(PROJECT)})
    slurm: Any = Slurm(7200)
    with dg.DagsterInstance.ephemeral() as instance:
        (before,) = preview_asset(definitions, "sweep", history=instance)
        rows = table([{"task": "rate=1", **NUMBERS, "max_rss_mib": 9216.0}, {"task": "rate=2", **NUMBERS}])
        longer = {**NUMBERS, "elapsed_seconds": 1330.0, "node_hours": 0.369444, "cpu_hours": 0.369444}
        events: list[dict[str, Any]] = [{"partition": CPU, "tasks": rows}, longer, {"rows": 7}]
        for metadata in events:
            instance.report_runless_asset_event(dg.AssetMaterialization("sweep", metadata=metadata))
        assert [(use.partition, use.seconds, use.memory) for use in past_uses(instance, [dg.AssetKey("sweep")])] == [
            ("", 1330, None), ("rate=1", 1000, 9216), ("rate=2", 1000, None),
        ]  # fmt: skip
        (shown,) = preview_asset(definitions, "sweep", history=instance)
        step: Any = type("Step", (), {"instance": instance, "selected_asset_keys": {dg.AssetKey("sweep")}})
        own = [Use(CPU, "", 1, 0, 1, 500)]
        found = proposal_metadata(step, shown.plan, own)["proposal"].md_str
        assert proposal_metadata(step, shown.plan, []) == {}
        assert proposal_metadata(step, shown.plan, [Use(CPU, "", 1, 0, 1, 9)]) == {}  # too short to read the history
        texts: dict[str, Any] = {"sweep": dg.MetadataValue.md(found), "number": 7, "text": dg.MetadataValue.md("own")}
        for asset, value in texts.items():
            instance.report_runless_asset_event(dg.AssetMaterialization(asset, metadata={"proposal": value}))
        last = last_proposals(instance, ["sweep", *texts, "(other)", "gone/by now"])
        instance.report_runless_asset_event(dg.AssetMaterialization("sweep"))
        assert last_proposals(instance, ["sweep"]) == {}  # the proposal was followed
    assert (before.proposed, "used" in before.summary) == (None, False)
    code = 'SlurmRequest(mem="12G", time_limit="00:35:00")'
    assert shown.summary["used"].startswith("The last 3 jobs of this size used at most 00:22:10 of 02:00:00, 9.0 of 64")
    assert shown.summary["enough"].startswith(
        f"{code}\nIts changes leave 50% more time, and 25% more of everything else, "
    )
    assert code in found
    assert found.startswith("The last 4 jobs")
    assert last == {"sweep": (found.splitlines()[0], code)}
    accepted, said = try_script(slurm, shown, Projects({}, default="p1"))
    assert accepted
    assert said.splitlines()[-1].startswith(f"the proposed request, {code}, would start at Tue Nov 14 ")
    assert said.endswith(": 01:59:59 earlier")
    at_once: Any = Slurm(0)
    assert try_script(at_once, shown, Projects({}, default="p1"))[1].endswith(": at the same time")


def test_a_history_that_cannot_be_read_costs_the_proposal_only() -> None:
    class Broken:
        def fetch_materializations(self, *_: Any, **__: Any) -> None:
            raise OSError("the database is locked")

    definitions = dg.Definitions([sweep], resources={"compute": ComputeResource.of(PROJECT)})
    (shown,) = preview_asset(definitions, "sweep")
    lines: list[str] = []
    log = type("Log", (), dict.fromkeys(("info", "warning", "error"), lines.append))
    step: Any = type("Step", (), {"instance": Broken(), "selected_asset_keys": {dg.AssetKey("sweep")}, "log": log})
    assert proposal_metadata(step, shown.plan, [Use(CPU, "", 1, 0, 1, 500)]) == {}
    assert lines == ["Dagster's history could not be read, so there is no proposal: the database is locked"]
