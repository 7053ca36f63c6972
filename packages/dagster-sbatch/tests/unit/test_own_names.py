"""Metadata of a workload under a name that the engine uses itself."""

import json
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg

from dagster_sbatch import FakeCompute, JobArray, ScriptLauncher, SlurmRequest
from dagster_sbatch.launchers import RayLauncher
from dagster_sbatch.run.adoption import Choice
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.run.plan import make_plan
from dagster_sbatch.run.remote_job import RemoteJob
from dagster_sbatch.run.results import OWN_NAMES
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm.gateway import Claim, JobEnd, Submitted
from resources import PROJECT, build_resources
from support import ROOT
from support.claims import single_job

WORKLOAD = "from dagster_pipes import open_dagster_pipes\nwith open_dagster_pipes(): pass\n"
REPORT = b"".join(
    json.dumps({"__dagster_pipes_version": "0.1", "method": method, "params": {}}).encode() + b"\n"
    for method in ("opened", "closed")
)
USAGE = {"memory_mib": 9.0, "cpu_seconds": 5.0, "gpu_percent": 3.0, "gpu_memory_mib": 9.0, "series": [[5.0, 1.0, 9.0]]}
END = JobEnd(0, "COMPLETED", "0:0", submitted=1, started=1, ended=9, usage=USAGE, account="p1")
REQUEST = {"partition": "a partition", "qos": "a QoS", "gpus_per_node": 1}
KEYS = ["2013-01", "2013-02"]


def warnings_of(instance: dg.DagsterInstance, run: str) -> list[str]:
    return [entry.user_message for entry in instance.all_logs(run) if entry.level == 30]


def test_the_step_s_log_warns_once_of_a_name_that_the_engine_uses_too() -> None:
    """Whatever the deployment is, also if each task of an array reports it."""

    @dg.asset(partitions_def=dg.StaticPartitionsDefinition(KEYS), backfill_policy=dg.BackfillPolicy.single_run())
    def probe(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        done = compute.run(context, workload=Path(__file__), launcher=ScriptLauncher(), array=JobArray())
        return done.get_materialize_result()

    tags = {"dagster/asset_partition_range_start": KEYS[0], "dagster/asset_partition_range_end": KEYS[-1]}
    for metadata, warned in (({"rows": 3, "job_id": 7, "host": "n1"}, 1), ({"rows": 3}, 0)):
        with dg.DagsterInstance.ephemeral() as instance:
            compute = FakeCompute(metadata=metadata)
            result = dg.materialize([probe], resources={"compute": compute}, tags=tags, instance=instance)
            found = warnings_of(instance, result.run_id)
        assert len(found) == warned
        assert all("under the same name: host, job_id. Dagster stores only one value" in text for text in found)


def test_a_report_on_a_single_partition_is_warned_of_too(tmp_path: Path) -> None:
    report = {"musica.partition": {"partition": "2013-01", "metadata": {"node_hours": 5}}}
    (tmp_path / "workload.py").write_text(WORKLOAD.replace("(): pass", f"() as p: p.report_custom_message({report})"))

    @dg.asset(partitions_def=dg.StaticPartitionsDefinition(KEYS))
    def probe(context: dg.AssetExecutionContext, compute: ComputeResource) -> dg.MaterializeResult:
        done = compute.run(context, workload=tmp_path / "workload.py", launcher=ScriptLauncher())
        return done.get_materialize_result()

    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([probe], resources=build_resources(), partition_key=KEYS[0], instance=instance)
        (text,) = warnings_of(instance, result.run_id)
    assert "node_hours" in text
    (event,) = result.asset_materializations_for_node("probe")
    assert event.metadata["node_hours"].value == 5
    assert event.metadata.keys() - OWN_NAMES == set()


class Gateway:
    """Ends its only job with everything that can be known of one."""

    def __init__(self) -> None:
        self.stop, self.committed = threading.Event(), False

    def run(self, run: str, files: Any, sinks: Any, _: str, on_submitted: Any, *__: Any) -> JobEnd:
        assert files is None, run
        on_submitted(Submitted("7", "found"))
        sinks["messages.jsonl"](REPORT)
        return END


def test_all_names_that_the_engine_adds_to_the_result_of_a_job_are_documented() -> None:
    settings = Settings.model_construct(supercomputer_site="musica")
    attempt = {"job": "6", "end": "out of memory", "request": {}, "costs": {}}
    record = {"call": 0, "inputs": {}, "request": REQUEST, "attempts": [attempt]}
    claim = Claim(None, runs="runs", attempts=[single_job(2, over=False, record=record)])

    @dg.asset
    def probe(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        plan = make_plan(settings, PROJECT, Path(__file__), RayLauncher(), SlurmRequest())
        step: Any = RemoteJob(context.op_execution_context, "probe", settings, plan)
        choice = Choice({"runs/family-2": {0: 0}}, 0, [])
        call = SimpleNamespace(family="family", number=0)
        step._family = SimpleNamespace(choose=lambda _: (claim, choice), call=call, request={}, record={})
        step._gateway, step._environment = Gateway(), None
        done: dg.MaterializeResult = step._execute().get_materialize_result()
        return done

    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([probe], instance=instance)
    (event,) = result.asset_materializations_for_node("probe")
    names = {"job_id", "dashboard", "usage", "attempts", "gpu_memory_max_mib", "qos", "partition"}
    assert names <= event.metadata.keys() <= OWN_NAMES
    text = (
        (ROOT / "packages" / "dagster-sbatch" / "docs" / "assets.md").read_text().partition("**Names of metadata.**")[2]
    )
    assert set(re.findall(r"`(\w+)`", text.partition("If a workload uses")[0])) == OWN_NAMES
