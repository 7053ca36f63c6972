"""Ops of one graph that run side by side, killed at random moments and executed again with the same or other values."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import dagster as dg
import pytest

from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite, wait_until
from support import ROOT
from support.background import STRESS, nobody_left, rows_of
from support.instances import make_instance
from support.step import ends_with_test

pytestmark = pytest.mark.cluster

PROGRAM = """\
import json, os, sys, threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import dagster as dg
from resources import build_resources
from dagster_sbatch.run.compute import ComputeResource
from dagster_sbatch.launchers import ScriptLauncher
from dagster_sbatch.slurm import SlurmRequest

FOLDER = Path(__file__).parent
WORKLOAD = FOLDER / "workloads" / "workload.py"
REQUEST = SlurmRequest(time_limit="00:30:00")

def compute_value(context, compute, name):
    value = json.loads((FOLDER / "value.json").read_text())
    extras = {"name": name, "value": value}
    done = compute.run(context, workload=WORKLOAD, launcher=ScriptLauncher(), request=REQUEST, extras=extras)
    return done.get_custom_messages()[0]

@dg.op(out=dg.DynamicOut())
def names():
    for name in ("a", "b"):
        yield dg.DynamicOutput(name, mapping_key=name)

@dg.op
def mapped(context: dg.OpExecutionContext, compute: ComputeResource, name: str) -> dg.Output[str]:
    return dg.Output(compute_value(context, compute, f"mapped {name}"))

@dg.op
def first(context: dg.OpExecutionContext, compute: ComputeResource) -> dg.Output[str]:
    return dg.Output(compute_value(context, compute, "first"))

@dg.op
def threads(context: dg.OpExecutionContext, compute: ComputeResource) -> dg.Output[str]:
    with ThreadPoolExecutor(3) as pool:
        values = pool.map(lambda name: compute_value(context, compute, name), ("x", "y", "y"))
        return dg.Output("\\n".join(values))

@dg.op
def join(context: dg.OpExecutionContext, one: str, two: str, many: list) -> str:
    values = "\\n".join([one, two, *many])
    (FOLDER / f"joined-{context.run_id}").write_text(values)
    return values

@dg.graph_asset
def joined():
    return join(first(), threads(), names().map(mapped).collect())

def make_job():
    executor = dg.multiprocess_executor.configured({"max_concurrent": 4, "start_method": {"forkserver": {}}})
    job = dg.define_asset_job("all", selection="*", executor_def=executor)
    return dg.Definitions(assets=[joined], jobs=[job], resources=build_resources()).resolve_job_def("all")

if __name__ == "__main__":
    options, job = {}, dg.reconstructable(make_job)
    with dg.DagsterInstance.get() as instance:
        if sys.argv[1:]:
            parent = instance.get_run_by_id(sys.argv[1])
            options["reexecution_options"] = dg.ReexecutionOptions(parent_run_id=parent.run_id)
            options["tags"] = {"dagster/root_run_id": parent.root_run_id or parent.run_id}
        with dg.execute_job(job, instance, **options) as result:
            (FOLDER / f"run-{os.getpid()}").write_text(result.run_id if result.success else "failed")
"""
WORKLOAD = """\
import os, time
from dagster_pipes import open_dagster_pipes
with open_dagster_pipes() as pipes:
    name, value = pipes.get_extra("name"), pipes.get_extra("value")
    print(f"{name} {value}", flush=True)
    time.sleep(1 + value % 3)
    pipes.report_custom_message(f"{name} {value}")
"""
EXPECTED = ("first", "mapped a", "mapped b", "x", "y", "y")


class Graph:
    """A graph asset with parallel ops and threads, whose runs are processes that can be killed."""

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        self.folder = folder
        (folder / "workloads").mkdir(parents=True)
        make_instance(folder / "dagster")
        (folder / "program.py").write_text(PROGRAM)
        (folder / "workloads" / "workload.py").write_text(WORKLOAD)
        self._variables = {**variables, "DAGSTER_HOME": str(folder / "dagster"), "PYTHONPATH": str(ROOT)}
        self.log = folder / "log"

    def start(self, value: int) -> "subprocess.Popen[bytes]":
        """Start a run, or a re-execution of the latest one."""
        (self.folder / "value.json").write_text(json.dumps(value))
        parent = [run.run_id for run in self.runs()[:1]]
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(self.folder / "program.py"), *parent],
                env=self._variables,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return ends_with_test(process)

    def runs(self) -> list[dg.DagsterRun]:
        """The latest comes first."""
        with dg.DagsterInstance.from_config(str(self.folder / "dagster")) as instance:
            return [record.dagster_run for record in instance.get_run_records()]

    def stored(self, op: str) -> int:
        """How often Dagster has stored the result of an op; `op` as job names have it."""
        with dg.DagsterInstance.from_config(str(self.folder / "dagster")) as instance:
            events = [
                record.event_log_entry
                for run in self.runs()
                for record in instance.get_records_for_run(run.run_id, of_type=dg.DagsterEventType.STEP_SUCCESS).records
            ]
        keys = [re.sub(r"[^A-Za-z0-9_]+", "-", str(event.step_key)).strip("-") for event in events]
        return keys.count(op)

    def result(self, process: "subprocess.Popen[bytes]") -> list[str] | None:
        """Of a run that ends by itself: what its ops returned; None if it has failed."""
        process.wait(300)
        joined = self.folder / f"joined-{(self.folder / f'run-{process.pid}').read_text()}"
        return sorted(joined.read_text().split("\n")) if joined.exists() else None


def kill_all(process: "subprocess.Popen[bytes]") -> None:
    """End a run and its steps as a power cut does."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.timeout(3600 if STRESS else 600)
def test_parallel_ops_killed_at_random_moments(
    site: SimulatedSite, tmp_path: Path, on_supercomputer: dict[str, str]
) -> None:
    """Each op gets its own job's result, for the values of its own run; no job is doubled or lost (STRESS=1: 200)."""
    variables = {**{name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}, **on_supercomputer}
    (rounds, lanes), tally = (200, 3) if STRESS else (4, 2), Counter[str]()
    wrong: list[str] = []
    graphs = [Graph(tmp_path / f"graph-{lane}", variables) for lane in range(lanes)]

    def play(lane: int) -> None:
        graph, number, value = graphs[lane], lane, 0
        while number < rounds and not wrong:
            process = graph.start(value)
            if random.random() < 0.75 and number + lanes < rounds:
                threading.Event().wait(random.uniform(4, 24))
                kill_all(process)
                tally["killed"] += 1
                changed = random.random() < 0.4
            else:
                found = graph.result(process)
                tally["ended"] += 1
                if found != sorted(f"{name} {value}" for name in EXPECTED):
                    wrong.append(f"round {number}, value {value}: {found}\n{graph.log.read_text()[-20000:]}")
                changed = random.random() < 0.5
            value += changed
            number += lanes
        tally["values"] += value + 1

    threads = [threading.Thread(target=play, args=(lane,)) for lane in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(dict(tally))
    assert not wrong, wrong[0]
    for op, jobs in one_job_for_each_run(site).items():
        calls = 3 if op == "joined-threads" else 1
        stored = sum(graph.stored(op) for graph in graphs)
        assert jobs <= calls * (tally["values"] + stored), f"{op}: {jobs} jobs, {tally}, {stored} results were stored"
    nobody_left(site, 90)


def one_job_for_each_run(site: SimulatedSite) -> Counter[str]:
    """Each run directory has had one job, each job has a directory, and none is left; the jobs of each op."""
    command = "cd dagster-slurm/runs && for run in */; do echo $run $(readlink ${run}job); done"
    listing = site.run_on_login(CERTIFICATE_USER, command).stdout.replace("/ ", " ")
    there = dict(line.split() for line in listing.splitlines() if " " in line.strip())
    jobs: list[tuple[str, str]] = []

    def accounted() -> bool:
        rows = site.sacct("-XnP", "--starttime=now-1days", "--format=JobName,JobID").split()
        jobs[:] = [(name, job) for name, job in (row.split("|") for row in rows) if name.startswith("joined-")]
        return {job for _, job in jobs} >= set(there.values())

    wait_until(accounted, "the accounting has the last jobs", 60)
    assert len(jobs) == len(dict(jobs)), "a run directory has had two jobs"
    assert dict(jobs) == there
    wait_until(lambda: not rows_of(site, "%i", "--states=PENDING,RUNNING"), "no job is left", 60)
    return Counter(name.rpartition("-")[0][: -len("-0123456789-0123456789")] for name in there)
