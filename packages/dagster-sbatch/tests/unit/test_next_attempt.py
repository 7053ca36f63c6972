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

from dagster_sbatch import ConfigurationError, JobArray, Retries, ScriptLauncher, SlurmRequest
from dagster_sbatch.run import remote_job
from dagster_sbatch.run.adoption import Choice, choose
from dagster_sbatch.run.array import Batches
from dagster_sbatch.run.attempts import load_request, store_request
from dagster_sbatch.run.plan import make_plan
from dagster_sbatch.run.remote_array import RemoteArray
from dagster_sbatch.run.remote_job import RemoteJob
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import allocate
from dagster_sbatch.slurm.gateway import (
    Attempt,
    Claim,
    JobEnd,
    Limits,
    Projects,
    RefusedError,
    Share,
    StoppedError,
    Submitted,
    Usage,
)
from dagster_sbatch.slurm.units import format_time
from resources import PROJECT
from support.background import attempts_of
from support.claims import single_job

REQUEST = SlurmRequest(mem="16G", time_limit="01:00:00", retries=Retries(max_mem="64G", max_time_limit="04:00:00"))
SETTINGS = Settings.model_construct(supercomputer_site="musica")
OOM, TIMEOUT = JobEnd(None, "OUT_OF_MEMORY", "0:125"), JobEnd(None, "TIMEOUT", "0:0")
SUCCESS = JobEnd(0, "COMPLETED", "0:0")
USAGE = Usage(
    user="xy", projects=["p1"], default="p1", since=None, now=datetime(2026, 11, 27, tzinfo=UTC), jobs=None, queue=[],
    shares=[Share("p1", "", "node", limit=90, used=0, running=0)], parents={}, private=False, trouble=[],
)  # fmt: skip
"""The project has 90 node-minutes left."""
KILLED = RuntimeError("killed")
REPORT = b"".join(
    json.dumps({"__dagster_pipes_version": "0.1", "method": method, "params": {"extras": {}}}).encode() + b"\n"
    for method in ("opened", "closed")
)
"""Messages of a workload that has succeeded."""


class Gateway:
    """Submits jobs 1, 2, ..., which end as the test has chosen."""

    def __init__(self, *ends: JobEnd | Exception) -> None:
        self.ends, self.records, self.rejected = list(ends), list[Any](), list[str]()
        self.stop, self.committed, self.metadata = threading.Event(), False, dict[str, Any]()

    def run(self, run: str, files: Any, _: Any, __: str, report: Callable[[Submitted], None], ___: Any) -> JobEnd:
        if files:
            self.records.append(json.loads(files["submitted_with.json"]))
        end = self.ends.pop(0)
        if not isinstance(end, RefusedError):
            report(Submitted(run.rpartition("-")[2], "submitted"))
        if isinstance(end, Exception):
            raise end
        return end

    def reject(self, run: str, _: int | None = None) -> None:
        self.rejected.append(run)

    def projects(self) -> Projects:
        return Projects({}, default="p1")

    def usage_before_submitting(self, *_: Any) -> Usage:
        return USAGE


CALL = SimpleNamespace(family="family", number=0)


class Family:
    """An earlier attempt, or none."""

    call = CALL

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.request = store_request(allocate(REQUEST, PROJECT.load_site("musica")).request)
        self.record = {"call": 0, "inputs": {}, "request": self.request}

    def choose(self, _: None) -> tuple[Claim, Choice]:
        return self.claim, choose(self.claim.attempts, {0: ""}, lambda *_: False, REQUEST.retries)

    def cancel_outdated(self, _: Claim) -> bool:
        return False


@pytest.fixture
def fail() -> Callable[..., str]:
    """`fail(gateway, claim, environments, policy, **settings)` runs a step, and returns the text of its failure."""

    def work(
        gateway: Gateway,
        claim: Claim,
        environments: list[Exception | None],
        policy: dg.RetryPolicy | None = None,
        **settings: Any,
    ) -> str:
        def find(*_: Any) -> Any:
            if error := environments.pop(0):
                raise error
            return SimpleNamespace(name="env", python="/env/bin/python", workloads="/code")

        @dg.asset(retry_policy=policy)
        def probe(context: dg.AssetExecutionContext) -> None:
            deployment = SETTINGS.model_copy(update=settings)
            plan = make_plan(deployment, PROJECT, Path(__file__), ScriptLauncher(), REQUEST)
            step: Any = RemoteJob(context.op_execution_context, "probe", deployment, plan)
            try:
                step._gateway, step._family, step._environment = gateway, Family(claim), SimpleNamespace(find=find)
                step._execute()
            except StoppedError:
                raise step._end() from None

        with dg.DagsterInstance.ephemeral() as instance:
            (failure,) = dg.materialize([probe], instance=instance, raise_on_error=False).get_step_failure_events()
        if found := failure.step_failure_data.user_failure_data:
            gateway.metadata = {**found.metadata}
        return str(failure.step_failure_data.error)

    return work


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ConfigurationError("Project p1 has 3 free."), "Project p1 has 3 free."),
        (RefusedError("No space left"), "refused on the supercomputer: No space left"),
    ],
    ids=["the budget", "the disk"],
)
def test_a_further_attempt_that_is_not_allowed(error: Exception, shown: str, fail: Callable[..., str]) -> None:
    """The failure says why the job failed, and not that it still runs; a re-execution begins anew."""
    gateway = Gateway(OOM)
    text = fail(gateway, Claim(None, runs="runs"), [None, error])
    assert f"it ran out of memory (Slurm: OUT_OF_MEMORY). No other attempt follows: {shown}" in text
    assert "still running" not in text
    assert gateway.rejected == ["runs/family-1"]


def test_a_further_attempt_that_slurm_refuses_is_a_failure_of_the_one_before(fail: Callable[..., str]) -> None:
    """Such as one without the only node. The failure says why the job failed; a re-execution begins anew."""
    gateway = Gateway(OOM, RefusedError("Requested node configuration is not available"))
    text = fail(gateway, Claim(None, runs="runs"), [None, None])
    refusal = "refused on the supercomputer: Requested node configuration is not available"
    assert f"it ran out of memory (Slurm: OUT_OF_MEMORY). No other attempt follows: {refusal}" in text
    (row,) = attempts_of(gateway.metadata)
    assert (row["job"], row["end"]) == ("1", "it ran out of memory (Slurm: OUT_OF_MEMORY)")
    assert gateway.rejected == ["runs/family-2"]


BADLY, AGAIN = JobEnd(3, "FAILED", "3:0"), JobEnd(75, "FAILED", "75:0")


@pytest.mark.parametrize(
    ("ends", "memory"),
    [
        ([OOM, BADLY] * 2, ["16G", "32G"] * 2),
        ([AGAIN] * 8, ["16G"] * 8),
        ([OOM, OOM, OOM], ["16G", "32G", "64G"]),  # it would run out of memory again
    ],
    ids=["another cause", "max_retries", "max_mem"],
)
def test_dagster_s_retry_policy_begins_after_the_last_attempt_unless_that_has_reached_a_limit(
    ends: list[JobEnd], memory: list[str], fail: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And then all attempts begin anew, with the request of the asset."""
    monkeypatch.setattr(remote_job, "RETRY_SECONDS", 0)
    gateway = Gateway(*ends)
    fail(gateway, Claim(None, runs="runs"), [None] * 9, dg.RetryPolicy(max_retries=1))
    assert [load_request(record, REQUEST).mem for record in gateway.records] == memory
    assert gateway.ends == []


def test_each_task_has_its_own_next_request_and_a_refusal_of_one_ends_no_other() -> None:
    """Of three tasks, one runs out of memory, one out of time, and one waits for room meanwhile."""
    array_of_three = JobArray(tasks={name: {} for name in "abc"})
    plan = make_plan(SETTINGS, PROJECT, Path(__file__), ScriptLauncher(), REQUEST, array=array_of_three)
    gateway, jobs = Gateway(), dict[str, Any]()

    @dg.asset
    def probe(context: dg.AssetExecutionContext) -> None:
        step: Any = RemoteArray(context.op_execution_context, "probe", SETTINGS, plan)
        step._gateway, step._claim, step._number = gateway, Claim(None, runs="runs"), 0
        step._found = SimpleNamespace(name="env", python="/env/bin/python", workloads="/code")
        record = {"call": 0, "inputs": {}, "request": store_request(REQUEST)}
        step._family = SimpleNamespace(call=CALL, record=record)
        step._batches = Batches(range(3), Limits(array=2, submit=None), None)

        def submit() -> str:
            taken = step.take()
            record = json.loads(taken.files["submitted_with.json"])
            request = load_request(record, REQUEST)
            jobs[taken.run] = [task["name"] for task in record["tasks"]], request.mem, format_time(request.time_limit)
            return str(taken.run)

        def end(run: str, task: int, how: JobEnd) -> None:
            step.started(run, task, "n1", "/tmp")
            if how.code == 0:
                step.sinks(run, task)["messages.jsonl"](REPORT)
            step.ended(run, task, how)

        with step._array.open():
            run = submit()
            step.submitted(run, Submitted("1", "submitted"))
            end(run, 0, OOM)
            end(run, 1, TIMEOUT)
            step.submitted(second := submit(), Submitted("2", "submitted"))
            step.refused(submit(), "no node has so much")
            step.submitted(fourth := submit(), Submitted("4", "submitted"))
            end(second, 0, SUCCESS)
            end(fourth, 0, OOM)
            step.submitted(fifth := submit(), Submitted("5", "submitted"))
            end(fifth, 0, SUCCESS)
            assert step.take() is None
            step._fail_refused()
        step._array.attempts = step._rows()
        assert step._array.where["partition"] == plan.allocation.request.partition
        step._array.complete()

    with dg.DagsterInstance.ephemeral() as instance:
        (failed,) = dg.materialize([probe], instance=instance, raise_on_error=False).get_step_failure_events()
    assert [*jobs.values()] == [
        (["a", "b"], "16G", "01:00:00"), (["c"], "16G", "01:00:00"), (["a"], "32G", "01:00:00"),
        (["b"], "16G", "02:00:00"), (["b"], "32G", "02:00:00"),
    ]  # fmt: skip
    cause = "it ran out of memory (Slurm: OUT_OF_MEMORY). No other attempt follows: "
    cause += "refused on the supercomputer: no node has so much"
    assert f"1 task (a): {cause}\nLogs: scripts/job 1_0 logs" in str(failed.step_failure_data.error)
    assert "1 of 3 tasks failed." in str(failed.step_failure_data.error)
    assert failed.step_failure_data.user_failure_data
    rows = attempts_of({**failed.step_failure_data.user_failure_data.metadata})
    assert [(row["task"], row["job"]) for row in rows] == [("a", "1_0"), ("b", "1_1"), ("b", "4_0"), ("b", "5_0")]
    assert gateway.rejected == ["runs/family-1"]


def test_an_array_job_of_an_earlier_run_that_slurm_has_never_accepted_is_submitted_as_the_asset_requests_it_now() -> (
    None
):
    """That run was killed before sbatch had answered, and Slurm refuses its request."""
    plan = make_plan(SETTINGS, PROJECT, Path(__file__), ScriptLauncher(), REQUEST, array=JobArray(tasks={"a": {}}))
    then, submitted = {"request": {"mem": "500G"}, "tasks": [plan.tasks[0].record]}, list[Any]()
    attempt = Attempt("runs/family-1", 1, None, over=False, tasks=[plan.tasks[0].id], ends={}, record=then)
    found = Claim(None, runs="runs", attempts=[attempt]), Choice({attempt.run: {0: 0}}, 0, [])

    @dg.asset
    def probe(context: dg.AssetExecutionContext) -> None:
        step: Any = RemoteArray(context.op_execution_context, "probe", SETTINGS, plan)
        step._gateway = SimpleNamespace(committed=False, limits=lambda *_: Limits(None, None))
        place = SimpleNamespace(name="env", python="/env/bin/python", workloads="/code")
        step._environment = SimpleNamespace(find=lambda *_: place)
        record = {"call": 0, "inputs": {}, "request": store_request(plan.allocation.request)}
        step._family = SimpleNamespace(call=CALL, request=record["request"], record=record, choose=lambda _: found)
        with step._array.open():
            step._choose({0: plan.tasks[0]})
            assert step._jobs_by_run[attempt.run].request.mem == "500G"
            step.refused(attempt.run, "no node has so much")
            assert step.take() is None
            step.request_before()()
            submitted.append(step.take())

    with dg.DagsterInstance.ephemeral() as instance:
        dg.materialize([probe], instance=instance, raise_on_error=False)
    (job,) = submitted
    record = json.loads(job.files["submitted_with.json"])
    assert (job.run, record["request"]["mem"], "changed_request" in record) == ("runs/family-2", "16G", False)


def test_a_request_that_was_changed_while_a_job_ran_applies_to_the_next_attempt(fail: Callable[..., str]) -> None:
    """And then it grows as usual, also in a step that adopts the job of that attempt after this one was killed."""
    record: dict[str, Any] = {"call": 0, "inputs": {}, "request": {"mem": "1G"}}
    memory = []
    for number in (1, 2):
        gateway = Gateway(OOM, KILLED)
        adopted = single_job(number, str(number), over=False, record=record)
        claim = Claim(None, runs="runs", attempts=[adopted])
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
    left = single_job(1, "1", end=TIMEOUT, record=first) if submitted else single_job(2, None, record=second)
    gateway = Gateway(TIMEOUT)
    text = fail(gateway, Claim(None, runs="runs", attempts=[left]), [None], **settings)
    assert "This call of compute.run could cost 2 node-hours (1 node x 02:00:00)." in text
    assert gateway.records == []  # nothing is submitted
    assert "killed" in fail(Gateway(KILLED), Claim(None, runs="runs"), [None], **settings)


def test_a_step_that_is_stopped_between_two_attempts_has_no_job(fail: Callable[..., str]) -> None:
    gateway = Gateway(JobEnd(None, "NODE_FAIL"))
    gateway.stop.set()
    text = fail(gateway, Claim(None, runs="runs"), [None])
    assert "The step was interrupted while it had no Slurm job." in text
    assert gateway.rejected == []  # the next run decides what follows
