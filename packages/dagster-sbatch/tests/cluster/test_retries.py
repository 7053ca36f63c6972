"""Failed jobs that a step submits again: with more memory, without the broken node, up to the limits of the request."""

import json
import os
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch import Retries, SlurmRequest
from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite, wait_until
from support.array_process import ArrayProcess
from support.background import Background, attempts_of, events, jobs_of, nobody_left, runs_there
from support.programs import make
from support.step import Step, kill
from support.workload_asset import EATS, PIPES, materialize

pytestmark = pytest.mark.cluster

GROWS: dict[str, Any] = {"mem": "200M", "retries": {"max_mem": "1G", "factor": 4}}
BEGIN = PIPES + "    import os, pathlib, sys, time\n    first = pathlib.Path.cwd().parent.name.endswith('-1')\n"
REPORT = "    pipes.report_asset_materialization(metadata={'node': os.uname().nodename})\n"
BROKEN = "    if first: raise RuntimeError('CUDA error: uncorrectable ECC error encountered')\n"
PROGRAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "memory": (f"    {EATS}\n", GROWS),
    "capped": (f"    {EATS}\n", {"mem": "100M", "retries": Retries(max_mem="150M")}),
    "gpu": (BROKEN, {"gpus_per_node": 1, "retries": Retries(exclude_failed_nodes=True)}),
}
WAITS = (
    f"{BEGIN}    {EATS}\n    print('grown', flush=True)\n"
    "    while not pathlib.Path.home().joinpath('go-on').exists(): time.sleep(0.1)\n"
    f"{REPORT}"
)
KEYS = ["2013-01-01", "2013-01-02", "2013-01-03", "2013-01-04"]
TASKS = f"""
import os, sys
if pipes.partition_key in ("2013-01-02", "2013-01-03"):
    {EATS}
pipes.report_asset_materialization(metadata={{"mem": os.environ["SLURM_MEM_PER_NODE"]}})
"""


@pytest.fixture
def variables(on_supercomputer: dict[str, str]) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return {**kept, **on_supercomputer}


def start(name: str, workloads: Path) -> Background:
    """Run a program, of an asset that Dagster retries where that can help."""
    text, fields = PROGRAMS[name]
    path = make(workloads, f"{BEGIN}{text}{REPORT}", f"{name}.py")
    request, policy = SlurmRequest(time_limit="00:30:00", **fields), dg.RetryPolicy(max_retries=1)
    return Background(lambda: materialize(path, workloads, request=request, retry_policy=policy))


def ended_again(site: SimulatedSite, job: str) -> bool:
    shown = site.cluster.query("scontrol", "show", "job", job).split()
    return {"Restarts=1", "JobState=COMPLETED"} <= set(shown)


@pytest.mark.usefixtures("on_supercomputer")
def test_jobs_that_fail_are_repeated_as_the_request_says(site: SimulatedSite, workloads: Path) -> None:
    runs = {name: start(name, workloads) for name in PROGRAMS}
    outcomes = {name: run.outcome(180) for name, run in runs.items()}
    for name in ("memory", "gpu"):
        outcome = outcomes[name]
        assert (outcome.error, outcome.retries) == ("", [])
        (metadata,) = outcome.materializations[None]
        first, second = attempts_of(metadata)
        assert (second["end"], second["job"]) == ("succeeded", str(metadata["job_id"]))
        assert min(first["node_hours"], second["node_hours"]) >= 0
        if name == "memory":
            assert "ran out of memory" in first["end"]
            assert [row["request"].partition(",")[0] for row in (first, second)] == ["mem=200M", "mem=800M"]
        else:
            assert first["end"] == "a GPU of the node is broken (stderr: 'uncorrectable ECC error')"
            (broken,) = {"g4001", "g4002"} - {metadata["node"]}
            assert second["request"].endswith(f"exclude={broken}")
    capped = outcomes["capped"]
    assert "No other attempt follows: mem='150M' has reached max_mem='150M'" in capped.error
    assert (capped.materializations, capped.retries) == ({}, [])
    assert len(runs_there(site)) == 2 * len(PROGRAMS)
    for run in runs_there(site):
        assert len(jobs_of(site, run)) == 1, run

    # An administrator requeues failed jobs: one has a next attempt, and the step of the other one is over.
    before, failed = events(site), [first["job"], str(capped.failure["job_id"])]
    site.cluster.query("scontrol", "requeue", ",".join(failed))
    for job in failed:
        wait_until(partial(ended_again, site, job), f"job {job} has ended again", 60)
    assert events(site) == before
    nobody_left(site)


def test_dagster_is_killed_during_the_second_attempt_and_tasks_of_an_array_are_repeated(
    site: SimulatedSite, tmp_path: Path, variables: dict[str, str]
) -> None:
    array = ArrayProcess(tmp_path / "array", variables, TASKS, KEYS[0], KEYS[-1])
    array.request = {"time_limit": "00:30:00", **GROWS}
    tasks = array.start()
    step = Step(tmp_path / "step", variables, WAITS)
    step.call(**GROWS)
    process = step.start(again=False)
    wait_until(lambda: "grown" in step.output, "the second attempt runs", 90)
    kill(process)
    submitted = re.search(r"job (\d+) \(submitted\) in \S+-2\.", step.log)
    assert submitted
    job = int(submitted[1])
    process = step.start(again=True)
    adopted = f"Slurm job {job} was submitted by an earlier run of this step. Attaching"
    wait_until(lambda: adopted in step.log, "it is adopted", 90)
    site.run_on_login(CERTIFICATE_USER, "touch go-on")
    success, error, metadata = step.result(process)
    assert (success, error, metadata["job_id"]) == (True, "", job)
    assert "keeps its Slurm request" not in step.log
    assert step.output == "grown\n"
    assert metadata["run_directory"].endswith("-2")

    outcome = array.outcome(tasks)
    assert outcome.error == ""
    mems = ["200", "800", "800", "200"]
    assert {key: each["mem"] for key, each in outcome.once.items()} == dict(zip(KEYS, mems, strict=True))
    assert all("mem=800M" in str(each["attempts"]) for each in outcome.once.values())
    read = "cat dagster-slurm/runs/*/submitted_with.json"
    records = re.sub(r"}{", "}\n{", site.run_on_login(CERTIFICATE_USER, read).stdout)
    tasks_of = [json.loads(line).get("tasks", ()) for line in records.splitlines()]
    started = Counter(task["name"] for each in tasks_of for task in each)
    assert started == dict(zip(KEYS, [1, 2, 2, 1], strict=True))
    nobody_left(site)
