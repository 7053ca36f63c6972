"""Which run directories may go, and when."""

from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch.inspect.remote_runs import RunRecord, TaskList
from dagster_sbatch.run.array import Task
from dagster_sbatch.run.directory import RunInfo
from dagster_sbatch.slurm.gateway import Attempt, JobEnd
from dagster_sbatch.upkeep import cleaning
from dagster_sbatch.upkeep.cleaning import KEEP_DAYS, KEEP_FAILED_DAYS, is_obsolete, make_cleaning_sensor
from resources import PROJECT
from support import access


@pytest.mark.parametrize(("days", "goes"), [(KEEP_DAYS - 1, False), (KEEP_DAYS + 1, True)])
def test_old_directories_of_runs_without_a_job_go(days: int, goes: bool) -> None:
    """sbatch has refused them; the agent decides whether one may still get a job."""
    about, age = RunInfo(run="r", root="r", asset="a", partitions=""), timedelta(days=days)
    run = RunRecord("/runs/a-1", None, about, None, datetime.now(UTC) - age, ("r",))
    with dg.DagsterInstance.ephemeral() as instance:
        assert is_obsolete(instance, run, age, no_tasks) is goes


@pytest.mark.parametrize(
    ("end", "days", "goes"),
    [
        (JobEnd(1, "FAILED"), KEEP_DAYS + 1, False),
        (JobEnd(1, "FAILED"), KEEP_FAILED_DAYS - 1, False),
        (JobEnd(1, "FAILED"), KEEP_FAILED_DAYS + 1, True),
        (JobEnd(0, "COMPLETED"), KEEP_DAYS + 1, False),  # this Dagster has not stored its result
        (JobEnd(0, "COMPLETED"), KEEP_FAILED_DAYS + 1, False),
        (None, KEEP_FAILED_DAYS + 1, False),  # its job may be running
    ],
)
def test_old_directories_of_jobs_that_have_ended_go(end: JobEnd | None, days: int, goes: bool) -> None:
    about, age = RunInfo(run="r", root="r", asset="a", partitions=""), timedelta(days=days)
    run = RunRecord("/runs/a-1", "17", about, end, datetime.now(UTC) - age, ("r",))
    with dg.DagsterInstance.ephemeral() as instance:
        assert is_obsolete(instance, run, age, no_tasks) is goes


def no_tasks(run: RunRecord) -> TaskList:
    raise AssertionError(f"{run.path} is no array job")


def stores(instance: dg.DagsterInstance, *partitions: str) -> str:
    """A run whose step `work` has stored some partitions, and then failed; its id."""

    @dg.op
    def work(context: dg.OpExecutionContext) -> None:
        for partition in partitions:
            context.log_event(dg.AssetMaterialization("a", partition=partition))
        raise ValueError

    @dg.job
    def job() -> None:
        work()

    return job.execute_in_process(instance=instance, raise_on_error=False).run_id


DONE, FAILED = JobEnd(0, "COMPLETED"), JobEnd(1, "FAILED")


@pytest.mark.parametrize(
    ("tasks", "ends", "stored", "goes"),
    [
        (["d1", "d2"], [DONE, FAILED], ["d1"], True),
        (["d1", "d2", "d3"], [DONE, DONE, FAILED], ["d1"], False),
        (["d1 d2 d3", "d4"], [DONE, FAILED], ["d1", "d2", "d3"], True),
        (["d1 d2 d3", "d4"], [DONE, FAILED], ["d1", "d3"], False),
        (["a..c", "d4"], [DONE, FAILED], ["a..c"], True),
        (["a..c", "d4"], [DONE, FAILED], ["a", "c"], False),
        (["d1", "d2"], [FAILED, FAILED], [], True),
        (["", ""], [DONE, FAILED], ["p"], False),  # parameter sets: only a step that succeeds stores them
        ([], [], [], False),  # its record cannot be read
    ],
)
def test_an_array_job_goes_when_the_results_of_its_tasks_are_stored(
    tasks: list[str], ends: list[JobEnd], stored: list[str], goes: bool
) -> None:
    """Each task is written as its partitions."""
    made = [Task(keys, keys.split()) for keys in tasks]
    record = {"tasks": [task.record for task in made]}
    known = dict(enumerate(ends))
    job = Attempt("/runs/a-1", 1, "17", bool(ends), (), known, record=record)
    runs: Any = SimpleNamespace(gateway=SimpleNamespace(attempt=lambda _: job))
    with dg.DagsterInstance.ephemeral() as instance:
        run_id = stores(instance, *stored)
        about = RunInfo(run=run_id, root=run_id, asset="a", partitions="", step="work")
        run = RunRecord("/runs/a-1", "17", about, JobEnd(1, "FAILED"), datetime.now(UTC), (run_id,), array=True)
        assert is_obsolete(instance, run, timedelta(days=KEEP_FAILED_DAYS + 1), partial(TaskList, runs)) is goes
        assert not is_obsolete(instance, run, timedelta(days=KEEP_FAILED_DAYS - 1), partial(TaskList, runs))


def test_the_end_of_an_old_job_that_nobody_has_asked_for_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What was cancelled while it waited has no record of its own, and Slurm's word counts after a while only."""
    for name, value in access.environment("http://127.0.0.1:1", tmp_path).items():
        monkeypatch.setenv(name, value)
    about, now = RunInfo(run="r", root="r", asset="a", partitions=""), datetime.now(UTC)
    old, young = now - timedelta(days=KEEP_DAYS + 1), now - timedelta(days=1)
    records = [
        RunRecord("/runs/old-1", "1", about, None, old, ("r",), array=True),
        RunRecord("/runs/young-1", "2", about, None, young, ("r",), array=True),
        RunRecord("/runs/single-1", "3", about, None, old, ("r",)),
    ]
    asked: list[str] = []
    gateway = SimpleNamespace(clean=lambda _, keys: keys, state=asked.append)
    runs = SimpleNamespace(all=lambda: records, folder="/runs", gateway=gateway)
    monkeypatch.setattr(cleaning, "open_runs", lambda *_: nullcontext(runs))
    monkeypatch.setattr(cleaning, "wait_for_access", lambda _: "")
    with dg.DagsterInstance.ephemeral() as instance:
        make_cleaning_sensor(PROJECT)(dg.build_sensor_context(instance=instance))
    assert asked == ["/runs/old-1", "/runs/single-1"]
