"""Array jobs that no run follows: listed, cancelled as a whole, and removed; their environment is in use until then."""

import json
from collections.abc import Iterator
from datetime import timedelta

import dagster as dg
import pytest

from dagster_sbatch.inspect.remote_runs import Runs, open_runs
from dagster_sbatch.upkeep import cleaning, ownership
from dagster_sbatch.upkeep.cleaning import make_cleaning_sensor
from dagster_sbatch.upkeep.orphans import make_orphan_sensor
from resources import PROJECT
from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite, wait_until
from support.array_run import RUNS, files_of, new_key
from support.submission import submit_run

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("on_supercomputer")]

ONE_OF_EACH = {"done": 1, "running": 1, "waiting": 1, "failed": 0}


@pytest.fixture
def runs() -> Iterator[Runs]:
    with open_runs(PROJECT.load_settings(), PROJECT) as runs:
        yield runs


def failed_run(instance: dg.DagsterInstance) -> str:
    """A run whose step has stored the partition n0, and failed while other tasks were running; its id."""

    @dg.op
    def work(context: dg.OpExecutionContext) -> None:
        context.log_event(dg.AssetMaterialization("a", partition="n0"))
        raise ValueError

    @dg.job
    def job() -> None:
        work()

    return job.execute_in_process(instance=instance, raise_on_error=False).run_id


def submit(runs: Runs, run_id: str, tasks: int) -> str:
    """Submit an array job: its first task ends, its second one runs, and the others wait; its run directory."""
    key = new_key()
    files = files_of(PROJECT.load_site("musica"), key, 'if [ "$index" != 0 ]; then sleep 600; fi', tasks, max_running=1)
    about = {"run": run_id, "root": run_id, "asset": "a", "step": "work", "environment": "live"}
    submit_run(runs.gateway, f"{RUNS}/{key}", {**files, "about.json": json.dumps(about)}, run_id)
    return f"{RUNS}/{key}"


def tick(instance: dg.DagsterInstance, cursor: str | None = None) -> dg.SensorResult:
    result = make_orphan_sensor(PROJECT)(dg.build_sensor_context(instance=instance, cursor=cursor))
    assert isinstance(result, dg.SensorResult)
    return result


def said(result: dg.SensorResult) -> str:
    assert isinstance(result.skip_reason, dg.SkipReason)
    return str(result.skip_reason.skip_message)


def test_an_array_job_that_no_run_follows(site: SimulatedSite, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "GRACE", timedelta())
    with dg.DagsterInstance.ephemeral() as instance:
        run_id = failed_run(instance)
        path = submit(runs, run_id, 3)
        wait_until(lambda: runs.task_counts(runs.all()) == {path: ONE_OF_EACH}, "the second task runs", 60)
        site.run_on_login(CERTIFICATE_USER, f"touch -d '2 days ago' {path}/tasks {path}/ends.json")
        assert runs.environments_in_use() == {"live"}
        job = str(runs.gateway.attempt(path).job)
        wait_until(lambda: runs.gateway.queue(RUNS)["jobs"][job][0] == "RUNNING", "squeue says so, too", 60)

        left = tick(instance)
        assert f"Slurm job {job} (a) is RUNNING, and no Dagster run follows it" in said(left)
        assert clean(instance, monkeypatch) == "nothing is old enough"

        run = instance.get_run_by_id(run_id)
        assert run
        instance.report_run_canceled(run)
        assert "CANCELLED, since its run was terminated" in said(tick(instance, left.cursor))
        ends = runs.gateway.attempt(path).ends
        assert [ends[index].state for index in range(3)] == ["COMPLETED", "CANCELLED", "CANCELLED"]
        assert site.squeue("--noheader", "--format=%i") == ""

        ended = submit(runs, run_id, 1)
        wait_until(lambda: runs.gateway.attempt(ended).over, "its task has ended", 60)
        removed = f"removed {ended.rpartition('/')[2]}"  # once nothing of it changes any more
        wait_until(lambda: clean(instance, monkeypatch) == removed, "it is removed", 60)
        site.run_on_login(CERTIFICATE_USER, f"test ! -e {ended}")


def clean(instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the sensor says when all run directories are old."""
    monkeypatch.setattr(cleaning, "KEEP_DAYS", 0)
    monkeypatch.setattr(cleaning, "KEEP_FAILED_DAYS", 0)
    result = make_cleaning_sensor(PROJECT)(dg.build_sensor_context(instance=instance))
    assert isinstance(result, dg.SkipReason)
    return str(result.skip_message)
