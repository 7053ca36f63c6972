"""What a step does between two attempts, with a login node that plays the ends of its jobs."""

import json
import threading
from collections.abc import Callable
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
from dagster_sbatch.slurm.gateway import Claim, JobEnd, StoppedError, Submitted
from resources import PROJECT

SETTINGS = Settings.model_construct(supercomputer_site="musica")
REQUEST = SlurmRequest(mem="16G", retries=Retries(max_mem="64G"))
OOM = JobEnd(None, "OUT_OF_MEMORY", "0:125")
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
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`fail(gateway, claim, environments)` runs a step, and returns the text of its failure."""

    def work(gateway: Gateway, claim: Claim, environments: list[Exception | None]) -> str:
        def find(*_: Any) -> Any:
            if error := environments.pop(0):
                raise error
            return SimpleNamespace(name="env", python="/env/bin/python", workloads="/code")

        monkeypatch.setattr(RemoteRun, "_find_environment", find)

        @dg.asset
        def probe(context: dg.AssetExecutionContext) -> None:
            plan = make_plan(SETTINGS, PROJECT, Path(__file__), ScriptLauncher(), REQUEST)
            step: Any = RemoteRun(context, "probe", SETTINGS, plan)
            try:
                step._execute(gateway, Attempts(claim), None)
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


def test_a_step_that_is_stopped_between_two_attempts_has_no_job(fail: Callable[..., str]) -> None:
    gateway = Gateway(JobEnd(None, "NODE_FAIL"))
    gateway.stop.set()
    text = fail(gateway, Claim(None, runs="runs"), [None])
    assert "The step was interrupted while it had no Slurm job." in text
    assert gateway.rejected == []  # the next run decides what follows
