"""What a tick says and keeps of the jobs that no run follows, whatever Slurm and the login node answer."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import dagster as dg
import pytest

from dagster_sbatch.inspect.remote_runs import RunRecord
from dagster_sbatch.run.directory import RunInfo
from dagster_sbatch.slurm.gateway import JobEnd, JobState, RefusedError
from dagster_sbatch.ssh import UnreachableError
from dagster_sbatch.upkeep import orphans, ownership
from dagster_sbatch.upkeep.orphans import make_orphan_sensor
from resources import PROJECT
from support import access

NONE_LEFT = "Every job that is waiting or running is followed by a run."


class Tick:
    """What one tick of the sensor says, logs, reports and keeps."""

    def __init__(self, instance: dg.DagsterInstance, cursor: str | None = None) -> None:
        self.logged: list[str] = []
        context = dg.build_sensor_context(instance=instance, cursor=cursor)
        context.log.info = self.logged.append  # type: ignore[assignment]
        result = make_orphan_sensor(PROJECT)(context)
        assert isinstance(result, dg.SensorResult)
        assert isinstance(result.skip_reason, dg.SkipReason)
        self.said = str(result.skip_reason.skip_message)
        self.checks = [(event.passed, event.description) for event in result.asset_events]  # type: ignore[union-attr]
        self.cursor = str(result.cursor)


class Supercomputer:
    """Its runs; `errors` has what a request about a job raises, by the job's id."""

    def __init__(self) -> None:
        self.records: list[RunRecord] = []
        self.errors: dict[str, Exception] = {}
        self.down = False
        self.folder, self.holders = "/runs", dict[str, str]()  # holders of claims, by family
        self.gateway = SimpleNamespace(cancel_all=self.cancel_all, state=self.state, claim=self.claim)
        self.cancelled: list[list[str]] = []

    @contextmanager
    def open(self, *_: object) -> Iterator["Supercomputer"]:
        if self.down:
            raise UnreachableError("no answer")
        yield self

    def add(self, run: str, job: str, family: str = "work") -> None:
        about = RunInfo(run=run, root=run, asset="asset", partitions="", step="work")
        self.records.append(RunRecord(f"/runs/{family}-{job}", job, about, None, datetime.now(UTC), (run,)))

    def all(self) -> list[RunRecord]:
        return self.records

    def claim(self, _: str, family: str, *__: str) -> SimpleNamespace:
        return SimpleNamespace(held_by=self.holders.get(family))

    def cancel_all(self, paths: list[str], report: Callable[[str, JobEnd | RefusedError], None]) -> None:
        self.cancelled.append(paths)
        for path in paths:
            try:
                self.refuse(path)
                report(path, JobEnd(None, "CANCELLED"))
            except RefusedError as error:
                report(path, error)

    def state(self, path: str) -> tuple[JobState, None]:
        self.refuse(path)
        return JobState("RUNNING", "None", None), None

    def refuse(self, path: str) -> None:
        error = self.errors.get(path.rpartition("-")[2])
        if error:
            raise error


@pytest.fixture
def supercomputer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Supercomputer:
    for name, value in access.environment("http://127.0.0.1:1", tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ownership, "GRACE", timedelta())
    made = Supercomputer()
    monkeypatch.setattr(orphans, "open_runs", made.open)
    return made


def failed(instance: dg.DagsterInstance, *, terminated: bool = False, of: str | None = None) -> str:
    """A run whose step failed while its job was running; its id."""

    @dg.op
    def work() -> None:
        raise ValueError

    @dg.job
    def job() -> None:
        work()

    tags = {"dagster/root_run_id": of} if of else None
    run_id = job.execute_in_process(instance=instance, raise_on_error=False, tags=tags).run_id
    if terminated:
        run = instance.get_run_by_id(run_id)
        assert run
        instance.report_run_canceled(run)
    return run_id


def failures(instance: dg.DagsterInstance, run: str) -> int:
    return len(instance.all_logs(run, of_type=dg.DagsterEventType.RUN_FAILURE))


def name(run: str, job: str) -> str:
    return f"job {job} of run {run} (asset)"


def test_a_job_that_is_refused_does_not_stop_the_others(
    instance: dg.DagsterInstance, supercomputer: Supercomputer
) -> None:
    run = failed(instance, terminated=True)
    for job in ("1", "2", "3"):
        supercomputer.add(run, job)
    supercomputer.errors = {"2": RefusedError("scancel: error: no")}
    tick = Tick(instance)
    cancelled = "CANCELLED, since its run was terminated"
    expected = [f"{name(run, '1')}: {cancelled}", f"{name(run, '2')}: scancel: error: no"]
    expected.append(f"{name(run, '3')}: {cancelled}")
    assert tick.said.splitlines() == tick.logged == expected
    assert supercomputer.cancelled == [["/runs/work-1", "/runs/work-2", "/runs/work-3"]]  # at the same time
    supercomputer.records, supercomputer.errors = supercomputer.records[1:2], {}
    assert Tick(instance, tick.cursor).said == f"{name(run, '2')}: {cancelled}"


def test_the_jobs_of_a_family_that_another_client_claims_are_left_to_it(
    instance: dg.DagsterInstance, supercomputer: Supercomputer
) -> None:
    run = failed(instance, terminated=True)
    for family, job in (("work", "1"), ("more", "2"), ("work", "3"), ("more", "4")):
        supercomputer.add(run, job, family)
    supercomputer.holders["work"] = "run 17"
    tick = Tick(instance)
    assert tick.logged[:2] == [f"{name(run, job)}: run 17 acts on it" for job in ("1", "3")]
    assert supercomputer.cancelled == [["/runs/more-2", "/runs/more-4"]]
    supercomputer.holders.clear()
    Tick(instance, tick.cursor)
    assert supercomputer.cancelled[1] == ["/runs/work-1", "/runs/work-3"]


def test_what_was_cancelled_is_told_if_the_time_runs_out_then(
    instance: dg.DagsterInstance, supercomputer: Supercomputer
) -> None:
    run = failed(instance, terminated=True)
    supercomputer.add(run, "1")
    supercomputer.add(run, "2")
    supercomputer.errors = {"2": UnreachableError("no answer (after 40 s)")}
    tick = Tick(instance)
    expected = [f"{name(run, '1')}: CANCELLED, since its run was terminated", "no answer (after 40 s)"]
    assert tick.said.splitlines() == tick.logged == expected


def test_a_job_that_is_listed_stays_so_while_it_is_refused(
    instance: dg.DagsterInstance, supercomputer: Supercomputer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = failed(instance)
    supercomputer.add(run, "1")
    first = Tick(instance)
    assert [passed for passed, _ in first.checks] == [False]
    supercomputer.errors = {"1": RefusedError("squeue: error: no")}
    monkeypatch.setattr(orphans, "LEFT_PAUSE", timedelta())
    second = Tick(instance, first.cursor)
    assert second.logged == [f"{name(run, '1')}: squeue: error: no"]
    assert second.said.endswith("scripts/job 1 cancel")
    assert second.checks == []


def test_a_listed_job_that_is_cancelled_leaves_the_list_if_the_time_runs_out_then(
    instance: dg.DagsterInstance, supercomputer: Supercomputer
) -> None:
    run = failed(instance)
    supercomputer.add(run, "1")
    supercomputer.add(run, "2")
    first = Tick(instance)
    terminated = instance.get_run_by_id(run)
    assert terminated
    instance.report_run_canceled(terminated)
    supercomputer.errors = {"2": UnreachableError("no answer (after 40 s)")}
    second = Tick(instance, first.cursor)
    assert second.logged == [f"{name(run, '1')}: CANCELLED, since its run was terminated", "no answer (after 40 s)"]
    ((passed, listed),) = second.checks
    assert not passed
    assert "Slurm job 2 (asset)" in str(listed)
    assert "Slurm job 1 (asset)" not in str(listed)


def test_a_retry_that_dagster_has_missed_is_requested_once(
    instance: dg.DagsterInstance, supercomputer: Supercomputer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = failed(instance)
    instance.add_run_tags(run, {"dagster/will_retry": "true"})
    supercomputer.add(run, "1")
    first = Tick(instance)
    assert (first.said, failures(instance, run)) == (f"run {run}: retry due", 1)
    monkeypatch.setattr(ownership, "RETRY_PATIENCE", timedelta())
    second = Tick(instance, first.cursor)
    assert (second.said, failures(instance, run)) == (f"run {run}: retry missed", 2)
    third = Tick(instance, second.cursor)  # for instance because retries were switched off meanwhile
    assert third.said.endswith("scripts/job 1 cancel")
    assert failures(instance, run) == 2


def test_a_missed_retry_is_requested_again_if_the_database_was_locked(
    instance: dg.DagsterInstance, supercomputer: Supercomputer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = failed(instance)
    instance.add_run_tags(run, {"dagster/will_retry": "true"})
    monkeypatch.setattr(ownership, "RETRY_PATIENCE", timedelta())
    with monkeypatch.context() as patched:
        patched.setattr(instance, "report_run_failed", lambda *_: sqlite3.connect("file:/?mode=ro", uri=True))
        with pytest.raises(sqlite3.OperationalError):
            Tick(instance)
    assert (Tick(instance).said, failures(instance, run)) == (f"run {run}: retry missed", 2)


def test_a_run_that_was_re_executed_is_not_retried_late(
    instance: dg.DagsterInstance, supercomputer: Supercomputer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = failed(instance)
    instance.add_run_tags(run, {"dagster/will_retry": "true"})
    supercomputer.add(run, "1")
    again = failed(instance, of=run)
    monkeypatch.setattr(ownership, "RETRY_PATIENCE", timedelta())
    assert Tick(instance).said.endswith("scripts/job 1 cancel")
    assert [failures(instance, each) for each in (run, again)] == [1, 1]


def test_a_run_whose_end_is_stored_late_is_examined(
    instance: dg.DagsterInstance, supercomputer: Supercomputer, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, other = failed(instance), failed(instance)
    supercomputer.add(late, "1")
    records = instance.get_run_records
    with monkeypatch.context() as patched:
        patched.setattr(instance, "get_run_records", lambda *args, **kw: [
            each for each in records(*args, **kw) if each.dagster_run.run_id != late
        ])  # fmt: skip
        tick = Tick(instance)
    assert other not in tick.said
    assert Tick(instance, tick.cursor).said.endswith("scripts/job 1 cancel")


@pytest.mark.parametrize("cursor", ["nonsense", None])
def test_a_cursor_that_tells_no_report_is_followed_by_one(
    instance: dg.DagsterInstance, supercomputer: Supercomputer, cursor: str | None
) -> None:
    failed(instance)
    supercomputer.down = True
    down = Tick(instance, cursor)
    assert down.checks == []  # nobody knows
    supercomputer.down = False
    tick = Tick(instance, down.cursor)
    assert tick.checks == [(True, NONE_LEFT)]
    assert Tick(instance, tick.cursor).checks == []


@pytest.mark.parametrize(("will_retry", "state"), [("false", "over"), ("true", "retry missed")])
def test_a_run_that_ended_by_a_clock_that_was_ahead_is_over(
    instance: dg.DagsterInstance, will_retry: str, state: str
) -> None:
    run = failed(instance)
    instance.add_run_tags(run, {"dagster/will_retry": will_retry})
    assert ownership.group_state(instance, run, datetime.now(UTC) - timedelta(days=3)) == state


def test_a_cursor_of_a_clock_that_was_ahead_hides_no_run(
    instance: dg.DagsterInstance, supercomputer: Supercomputer
) -> None:
    ahead = (datetime.now(UTC) + timedelta(days=3)).isoformat()
    run = failed(instance)
    supercomputer.add(run, "1")
    tick = Tick(instance, f'{{"since": "{ahead}", "groups": {{}}, "report": ""}}')
    assert tick.said.endswith("scripts/job 1 cancel")
