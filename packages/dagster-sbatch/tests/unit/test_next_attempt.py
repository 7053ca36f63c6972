"""What a step does between two attempts, with a login node that plays the ends of its jobs."""

import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch import ConfigurationError, Retries, ScriptLauncher, SlurmRequest
from dagster_sbatch.run.adoption import Choice, choose
from dagster_sbatch.run.attempt_record import load_request, store_request
from dagster_sbatch.run.plan import make_plan
from dagster_sbatch.run.remote import RemoteRun
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import allocate
from dagster_sbatch.slurm.gateway import Claim, JobEnd, Share, StoppedError, Submitted, Usage
from resources import PROJECT

REQUEST = SlurmRequest(mem="16G", time_limit="01:00:00", retries=Retries(max_mem="64G", max_time_limit="04:00:00"))
OOM, TIMEOUT = JobEnd(None, "OUT_OF_MEMORY", "0:125"), JobEnd(None, "TIMEOUT", "0:0")
USAGE = Usage(
    user="xy", projects=["p1"], default="p1", since=None, now=datetime(2026, 11, 27, tzinfo=UTC), jobs=None, queue=[],
    shares=[Share("p1", "", "node", limit=90, used=0, running=0)], parents={}, private=False, trouble=[],
)  # fmt: skip
"""The project has 90 node-minutes left."""
KILLED = RuntimeError("killed")


class Gateway:
    """Submits jobs 1, 2, ..., which end as the test has chosen."""

    def __init__(self, *ends: JobEnd | Exception) -> None:
        self.ends, self.records, self.rejected = list(ends), list[Any](), list[str]()
        self.stop, self.committed = threading.Event(), False

    def run(self, run: str, files: Any, sinks: Any, on_submitted: Callable[[Submitted], None], *_: Any) -> JobEnd:
        if files:
            self.records.append(json.loads(files["submitted_with.json"]))
        on_submitted(Submitted(run.rpartition("-")[2], "submitted"))
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end

    def reject(self, run: str) -> None:
        self.rejected.append(run)

    def usage_ahead(self, _: datetime | None) -> Callable[[float], Usage]:
        return lambda _: USAGE


class Attempts:
    """An earlier attempt, or none."""

    family = "family"

    def __init__(self, claim: Claim) -> None:
        self.claim, self.submission = claim, self
        self.request = store_request(allocate(REQUEST, PROJECT.load_site("musica")).request)
        self.record = {"call": 0, "inputs": {}, "request": self.request}

    def choose(self) -> tuple[Claim, Choice]:
        return self.claim, choose(self.claim, stored=False, retries=REQUEST.retries)

    def cancel_outdated(self, _: Claim) -> bool:
        return False


@pytest.fixture
def fail() -> Callable[..., str]:
    """`fail(gateway, claim, environments, **settings)` runs a step, and returns the text of its failure."""

    def work(gateway: Gateway, claim: Claim, environments: list[Exception | None], **settings: Any) -> str:
        def find(_: Any) -> Any:
            if error := environments.pop(0):
                raise error
            return SimpleNamespace(name="env", python="/env/bin/python", workloads="/code")

        @dg.asset
        def probe(context: dg.AssetExecutionContext) -> None:
            deployment = Settings.model_construct(supercomputer_site="musica", **settings)
            plan = make_plan(deployment, PROJECT, Path(__file__), ScriptLauncher(), REQUEST)
            step: Any = RemoteRun(context, "probe", deployment, plan)
            try:
                step._execute(gateway, Attempts(claim), SimpleNamespace(find=find))
            except StoppedError:
                raise step._end(gateway) from None

        with dg.DagsterInstance.ephemeral() as instance:
            (failure,) = dg.materialize([probe], instance=instance, raise_on_error=False).get_step_failure_events()
        return str(failure.step_failure_data.error)

    return work


def test_the_budget_refuses_a_further_attempt(fail: Callable[..., str]) -> None:
    """The failure says why the job failed, and not that it still runs; a re-execution begins anew."""
    gateway = Gateway(OOM)
    text = fail(gateway, Claim(None, runs="runs"), [None, ConfigurationError("Project p1 has 3 free.")])
    assert "it ran out of memory (Slurm: OUT_OF_MEMORY). No other attempt follows: Project p1 has 3 free." in text
    assert "still running" not in text
    assert gateway.rejected == ["runs/family-1"]


def test_a_request_that_was_changed_while_a_job_ran_applies_to_the_next_attempt(fail: Callable[..., str]) -> None:
    """And then it grows as usual, also in a step that adopts the job of that attempt after this one was killed."""
    record: dict[str, Any] = {"call": 0, "inputs": {}, "request": {"mem": "1G"}}
    memory = []
    for number in (1, 2):
        gateway = Gateway(OOM, KILLED)
        claim = Claim(None, runs="runs", attempt=number, over=False, job=str(number), record=record)
        assert "killed" in fail(gateway, claim, [None])
        (record,) = gateway.records
        memory.append(load_request(record, REQUEST).mem)
    assert memory == ["16G", "32G"]
    assert [attempt["request"]["mem"] for attempt in record["attempts"]] == ["1G", "16G"]


@pytest.mark.parametrize("settings", [{"most_node_hours_per_run": 1.5}, {"keep_within_budget": True}], ids=str)
@pytest.mark.parametrize("submitted", [True, False], ids=["a failed job", "an attempt without a job"])
def test_the_attempt_that_a_killed_execution_has_left_to_do_is_compared_with_the_limits(
    settings: dict[str, Any], submitted: bool, fail: Callable[..., str]
) -> None:
    """Its request is twice that of the asset, which is within the limits."""
    killed = Gateway(TIMEOUT, KILLED)
    assert "killed" in fail(killed, Claim(None, runs="runs"), [None, None])
    first, second = killed.records
    if submitted:
        left = Claim(None, runs="runs", attempt=1, end=TIMEOUT, job="1", record=first)
    else:
        left = Claim(None, runs="runs", attempt=2, record=second)
    gateway = Gateway(TIMEOUT)
    text = fail(gateway, left, [None], **settings)
    assert "This call of compute.run could cost 2 node-hours (1 node x 02:00:00)." in text
    assert gateway.records == []  # nothing is submitted
    assert "killed" in fail(Gateway(KILLED), Claim(None, runs="runs"), [None], **settings)


def test_a_step_that_is_stopped_between_two_attempts_has_no_job(fail: Callable[..., str]) -> None:
    gateway = Gateway(JobEnd(None, "NODE_FAIL"))
    gateway.stop.set()
    text = fail(gateway, Claim(None, runs="runs"), [None])
    assert "The step was interrupted while it had no Slurm job." in text
    assert gateway.rejected == []  # the next run decides what follows
