"""Which job a step adopts, what counts as the same work, and what is said about it."""

import logging
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.execution.api import execute_run

from dagster_sbatch.launchers import (
    BatchScriptLauncher,
    CommandLauncher,
    Container,
    Launcher,
    RayLauncher,
    ScriptLauncher,
    SrunLauncher,
)
from dagster_sbatch.project import Project
from dagster_sbatch.run import adoption
from dagster_sbatch.run.adoption import (
    NO_RECORD,
    Choice,
    choose,
    describe_adoption,
    inputs_of,
    name_differences,
    name_request_changes,
    outdated_runs,
)
from dagster_sbatch.run.calls import StepCalls, StepName
from dagster_sbatch.run.digests import digest_of
from dagster_sbatch.run.family import Family
from dagster_sbatch.run.history import is_stored, shared_runs
from dagster_sbatch.run.plan import Plan
from dagster_sbatch.run.workload import Workload
from dagster_sbatch.slurm import Allocation, Retries, Site, SlurmRequest
from dagster_sbatch.slurm.gateway import Attempt, Claim, JobEnd, OtherRun, Questions
from support.claims import single_job

WELL = JobEnd(0, "COMPLETED", "0:0")
FORGOTTEN = JobEnd(0, "", "")
BADLY = JobEnd(3, "FAILED", "3:0")
RUN = dg.DagsterRun("all")


@pytest.mark.parametrize(
    ("attempt", "stored", "said"),
    [
        (None, False, ""),
        (single_job(1, job=None), False, ""),  # laid out, never submitted
        (single_job(1, over=False), False, "Slurm job 7 was submitted by an earlier run of this step."),
        # sbatch has not answered
        (single_job(1, job=None, over=False), False, "The Slurm job was submitted by an earlier run of this step."),
        (single_job(3, end=WELL), False, "Slurm job 7 of an earlier run of this step has ended. Using its result."),
        (single_job(3, end=FORGOTTEN), False, "has ended. Using its result."),
        (single_job(3, end=WELL), True, ""),
        (single_job(3, end=WELL, rejected=True), False, ""),
        (single_job(3, end=BADLY), False, ""),
        (single_job(3, end=JobEnd(0, "CANCELLED", "0:15")), False, ""),
    ],
)
def test_the_latest_attempt_or_a_new_one(attempt: Attempt | None, stored: bool, said: str) -> None:
    """`said`: of an attempt that is adopted."""
    choice = choose([attempt] if attempt else [], {0: ""}, lambda *_: stored, Retries())
    assert choice.follow == ({attempt.run: {0: 0}} if attempt and said else {})
    assert (list(choice.new), choice.outdated) == ([] if said else [0], {})
    assert not said or (attempt and said in describe_adoption(attempt))


BASE: dict[str, Any] = {
    "code": {"code a.py": "1", "packages": "2"},
    "extras": {"n": 1},
    "env": {"X": "1"},
    "args": ("-v",),
    "step": {"assets": ["a"]},
    "data_root": "/data",
}


def inputs(launcher: Launcher | None = None, request: SlurmRequest | None = None, **changes: Any) -> dict[str, str]:
    values = {**BASE, **changes}
    workload = Workload(Path("/root/a.py"), Path("/root"), None, values.pop("args"))
    allocation = Allocation(request or SlurmRequest())
    env, extras = values.pop("env"), values.pop("extras")
    plan = Plan(Project(Path("/root")), workload, launcher or ScriptLauncher(), Site(), allocation, env, extras, ())
    return inputs_of(plan, **values)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"code": {"code a.py": "9", "packages": "2"}}, "code a.py"),
        ({"code": {"code a.py": "1", "code b.py": "1", "packages": "2"}}, "code b.py (gone)"),
        ({"code": {"code a.py": "1", "packages": "3"}}, "packages"),
        ({"extras": {"n": 2}}, "extras['n']"),
        ({"extras": {}}, "extras['n'] (new)"),
        ({"extras": {"n": 1, "m": None}}, "extras['m'] (gone)"),
        ({"extras": {"n": 1, "partition_keys": ["p"]}}, "partitions"),
        ({"env": {"X": "2"}}, "env['X']"),
        ({"env": {}}, "env['X'] (new)"),
        ({"args": ()}, "args"),
        ({"step": {"assets": ["a", "b"]}}, "assets"),
        ({"step": {"assets": ["a"], "upstream step b": "run"}}, "upstream step b (gone)"),
        ({"data_root": "/other"}, "DATA_ROOT"),
        ({"image": "7"}, "container image (gone)"),
        ({"launcher": ScriptLauncher(pre_start_commands=("true",))}, "launcher.pre_start_commands"),
    ],
)
def test_what_decides_the_result_is_named_without_its_value(changed: dict[str, Any], named: str) -> None:
    assert name_differences(inputs(), {"inputs": inputs(**changed)}) == named


def test_another_launcher_and_the_order_of_names() -> None:
    assert "launcher, launcher." in name_differences(inputs(), {"inputs": inputs(launcher=RayLauncher())})
    assert inputs(extras={"a": 1, "b": {"x": 1, "y": 2}}) == inputs(extras={"b": {"y": 2, "x": 1}, "a": 1})


def test_the_slurm_request_is_not_an_input() -> None:
    assert inputs(request=SlurmRequest(time_limit="02:00:00", nodes=2)) == inputs()


@pytest.mark.parametrize(
    ("launcher", "digest"),
    [
        (BatchScriptLauncher(), "d99fcb23c1596a6d"),
        (CommandLauncher(), "1b1772ebba95329e"),
        (RayLauncher(), "fd4dd13f6feb4b4d"),
        (ScriptLauncher(), "c60998384b5dfd8e"),
        (SrunLauncher(), "5cf9c2bdbda28b89"),
    ],
)
def test_an_upgrade_changes_no_inputs(launcher: Launcher, digest: str) -> None:
    """An engine with other inputs cancels the jobs of the one before. Leave out a new input while it has no value."""
    assert digest_of(inputs(launcher)) == digest


def test_many_differences_are_counted_and_no_record_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adoption, "MOST_NAMES", 2)
    assert name_differences({"a": "1", "b": "1", "c": "1"}, {"inputs": {}}) == "a (new), b (new) and 1 more"
    assert name_differences(inputs(), None) == NO_RECORD


def test_changes_of_the_request_are_named_with_their_values() -> None:
    mine, theirs = {"nodes": 2, "time_limit": "02:00:00"}, {"time_limit": "01:00:00", "qos": "q"}
    said = name_request_changes(mine, {"request": theirs})
    assert said == "nodes=default (now 2), qos=q (now default), time_limit=01:00:00 (now 02:00:00)"
    assert name_request_changes(mine, {"request": mine}) == ""


def test_a_record_of_another_version_lacks_what_this_one_compares() -> None:
    assert name_differences({"a": "1"}, {"later": 1}) == "a (new)"
    assert name_request_changes({"nodes": 2}, {"later": 1}) == "nodes=default (now 2)"
    assert outdated_runs([OtherRun("family", "run", "7", {"later": 1})], 1)


def other(call: int | None) -> OtherRun:
    return OtherRun(f"family-{call}", "run", "7", None if call is None else {"call": call})


def test_jobs_of_calls_that_are_still_to_come_are_not_outdated() -> None:
    others = [other(0), other(1), other(2), other(None)]
    assert outdated_runs(others, 2) == [others[0], others[1], others[3]]


def test_calls_have_the_same_names_in_any_order() -> None:
    """Threads of a step may call in another order the next time; equal calls are interchangeable."""
    digests = [digest_of(n) for n in (1, 2, 3, 3)]
    first, second = StepCalls(), StepCalls()
    names = [first.begin("root", "step", digest).family for digest in digests]
    assert len(set(names)) == 4
    again = [(digest, second.begin("root", "step", digest).family) for digest in reversed(digests)]
    assert sorted(again) == sorted(zip(digests, names, strict=True))
    assert not {StepCalls().begin("root", "step[a]", digest).family for digest in digests} & set(names)
    assert not {StepCalls().begin("another", "step", digest).family for digest in digests} & set(names)


def test_calls_of_many_threads_are_counted() -> None:
    step, numbers = StepCalls(), []
    threads = [
        threading.Thread(target=lambda: numbers.append(step.begin("root", "step", "same").number)) for _ in range(50)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(50))
    assert step.begun == 50


def test_jobs_are_not_outdated_while_a_thread_prepares_its_call() -> None:
    """It asks the login node for its image, before it is known that it may adopt the job of an earlier run."""
    step, waits = StepCalls(), []
    call = step.begin("root", "step", "mine")
    theirs = OtherRun(StepCalls().begin("root", "step", "theirs").family, "run", "7", {"call": 0})
    preparing = step.preparing()

    class Stop:
        def wait(self, seconds: float) -> bool:
            waits.append(seconds)
            if len(waits) == 3:
                step.begin("root", "step", "theirs")
                preparing.__exit__(None, None, None)
            return False

    gateway: Any = SimpleNamespace(stop=Stop())  # a claim or a cancellation would be an error
    with dg.DagsterInstance.ephemeral() as instance:
        context: Any = SimpleNamespace(log=logging.getLogger(), instance=instance, run=RUN)
        attempts = Family(context, gateway, "/base/runs", call, {}, SlurmRequest(), questions=Questions())
    preparing.__enter__()
    assert not attempts.cancel_outdated(Claim(None, others=[theirs]))
    assert len(waits) == 3


def test_runs_whose_new_results_count_for_another_one() -> None:
    done, started = dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.STARTED
    root = dg.DagsterRun("all", status=started)
    group: dict[str, Any] = {
        "root_run_id": root.run_id,
        "parent_run_id": root.run_id,
        "tags": {"dagster/root_run_id": root.run_id},
    }
    before, beside, own, later = (dg.DagsterRun("all", status=each, **group) for each in (done, started, started, done))
    with dg.DagsterInstance.ephemeral() as instance:
        for run in (root, before, beside, own, later):
            instance.add_run(run)
        assert shared_runs(instance, own) == {each.run_id for each in (root, beside, own, later)}
        instance.delete_run(own.run_id)
        assert shared_runs(instance, own) == {each.run_id for each in (root, beside)}


@pytest.mark.parametrize("case", ["stored before", "clock set back", "stored meanwhile", "outlived its run"])
def test_whether_a_result_counts_for_a_re_execution(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes anew what was stored before; it shares what a run stores that was not over when the step began."""
    choices: list[Choice] = []

    @dg.asset
    def probe(context: dg.AssetExecutionContext) -> None:
        if not context.run.parent_run_id:
            if case == "outlived its run":
                context.instance.report_run_failed(context.run)
            return
        call = StepCalls().begin(context.run.root_run_id or "", "probe", "digest")
        gateway: Any = SimpleNamespace(claim=claim)
        step = context.op_execution_context
        family = Family(step, gateway, "/runs", call, {}, SlurmRequest(), questions=Questions())
        choices.append(family.choose()[1])

    def claim(*_: object) -> Claim:
        if case == "stored meanwhile":
            execute_run(InMemoryJob(job), first, instance)
        return Claim(None, attempts=[replace(single_job(1, end=WELL), followers=[first.run_id])])

    definitions = dg.Definitions(assets=[probe], jobs=[dg.define_asset_job("all", executor_def=dg.in_process_executor)])
    job = definitions.resolve_job_def("all")
    with dg.DagsterInstance.ephemeral() as instance:
        first = instance.create_run_for_job(job)
        if case != "stored meanwhile":
            with monkeypatch.context() as clock:
                if case == "clock set back":
                    now, now_ns = time.time, time.time_ns
                    clock.setattr(time, "time", lambda: now() + 3600)
                    clock.setattr(time, "time_ns", lambda: now_ns() + 3600 * 10**9)
                execute_run(InMemoryJob(job), first, instance)
        root = first.run_id
        again = instance.create_run_for_job(
            job, tags={"dagster/root_run_id": root}, root_run_id=root, parent_run_id=root
        )
        execute_run(InMemoryJob(job), again, instance)
    shared = case in ("stored meanwhile", "outlived its run")
    assert [list(each.new) for each in choices] == [[] if shared else [0]]


def test_one_call_of_a_step_acts_on_an_outdated_job() -> None:
    step = StepCalls()
    mine = step.begin("root", "step", "digest").family
    assert not step.claim_once(mine)
    assert step.claim_once("theirs")
    assert not step.claim_once("theirs")


def test_steps_of_a_graph_have_keys_and_success_is_read_by_them() -> None:
    """The keys are those of Dagster's events, with the mapping key of a dynamic output."""
    seen = []

    @dg.op(out=dg.DynamicOut())
    def fan() -> Any:
        for name in ("a", "b"):
            yield dg.DynamicOutput(name, mapping_key=name)

    @dg.op
    def work(context: dg.OpExecutionContext, name: str) -> None:
        seen.append(StepName.of(context))
        if name == "b":
            raise ValueError(name)

    @dg.graph
    def inner() -> None:
        fan().map(work)

    @dg.job
    def outer() -> None:
        inner()

    with dg.DagsterInstance.ephemeral() as instance:
        result = outer.execute_in_process(instance=instance, raise_on_error=False)
        assert [step.key for step in seen] == ["inner.work[a]", "inner.work[b]"]
        assert [is_stored(instance, ["unknown", result.run_id], step) for step in seen] == [True, False]


def test_what_a_blocking_check_has_failed_is_stored() -> None:
    """A re-execution that adopts its job would end like that for ever."""
    spec = dg.AssetCheckSpec("good", asset="probe", blocking=True)

    @dg.asset(check_specs=[spec])
    def probe() -> dg.MaterializeResult:
        return dg.MaterializeResult(check_results=[dg.AssetCheckResult(passed=False, check_name="good")])

    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([probe], instance=instance, raise_on_error=False)
        assert not result.success
        assert is_stored(instance, [result.run_id], StepName("probe", {"probe"}))


def test_a_container_and_the_program_that_runs_it_are_inputs() -> None:
    image = inputs(ScriptLauncher(container=Container("a.sif")))
    assert image["launcher.container"] != inputs(ScriptLauncher(container=Container("b.sif")))["launcher.container"]
    assert image["launcher.container"] != inputs()["launcher.container"]
