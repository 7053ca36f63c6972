"""Which runs count as dead: by their process, and never by the clock, which may be set at any time."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator

import dagster as dg
import pytest

from dagster_sbatch.run_launcher.run_process import RunProcess
from dagster_sbatch.upkeep.dead_runs import end_dead_runs_sensor

SLEEP = "import time; time.sleep(600)"
ALIVE = "every run that has started has a living process"


@dg.job
def nothing() -> None:
    """No op."""


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test(overrides={"run_launcher": {"module": "dagster", "class": "DefaultRunLauncher"}}) as made:
        yield made


@pytest.fixture
def python() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen([sys.executable, "-c", SLEEP]) as process:
        yield process
        process.kill()


def started(instance: dg.DagsterInstance, pid: int, seconds_ago: float = 0) -> str:
    """A run that a process began so long ago by the clock; its id."""
    run = instance.create_run_for_job(nothing, status=dg.DagsterRunStatus.STARTING)
    event = dg.DagsterEvent(
        event_type_value=dg.DagsterEventType.RUN_START.value, job_name=run.job_name, message="", pid=pid
    )
    entry = dg.EventLogEntry(  # type: ignore[no-untyped-call]
        error_info=None, user_message="", level="info", run_id=run.run_id, timestamp=time.time() - seconds_ago,
        job_name=run.job_name, dagster_event=event,
    )  # fmt: skip
    instance.handle_new_event(entry)
    assert status(instance, run.run_id) == dg.DagsterRunStatus.STARTED
    return run.run_id


@pytest.mark.parametrize("monitored", [True, False])
def test_a_forked_run_is_left_to_run_monitoring_if_that_is_enabled(
    python: "subprocess.Popen[bytes]", monitored: bool
) -> None:
    process = RunProcess.find(python.pid)
    assert process
    overrides = {"run_monitoring": {"enabled": monitored}}
    with dg.instance_for_test(overrides=overrides) as instance:
        run_id = started(instance, python.pid)
        instance.add_run_tags(run_id, process.tags(run_id))
        assert tick(instance)[0] == ALIVE
        python.kill()
        python.wait()
        assert tick(instance)[0] == (ALIVE if monitored else f"ended {run_id}")


def status(instance: dg.DagsterInstance, run_id: str) -> dg.DagsterRunStatus:
    run = instance.get_run_by_id(run_id)
    assert run
    return run.status


def tick(instance: dg.DagsterInstance, cursor: str | None = None) -> tuple[str, str]:
    """What a tick says, and its cursor."""
    result = end_dead_runs_sensor(dg.build_sensor_context(instance=instance, cursor=cursor))
    assert isinstance(result, dg.SensorResult)
    assert isinstance(result.skip_reason, dg.SkipReason)
    return str(result.skip_reason.skip_message), str(result.cursor)


@pytest.mark.parametrize("seconds", [-3600, 0, 60, 86400])
def test_a_clock_that_is_set_ends_no_run(
    instance: dg.DagsterInstance, python: "subprocess.Popen[bytes]", seconds: float
) -> None:
    run_id = started(instance, python.pid, seconds)
    said, cursor = tick(instance)
    assert said == ALIVE
    assert tick(instance, cursor) == (ALIVE, cursor)
    assert status(instance, run_id) == dg.DagsterRunStatus.STARTED
    python.kill()
    python.wait()
    assert tick(instance, cursor) == (f"ended {run_id}", "{}")
    assert status(instance, run_id) == dg.DagsterRunStatus.FAILURE


def test_another_process_under_the_same_number_is_not_the_runs(
    instance: dg.DagsterInstance, python: "subprocess.Popen[bytes]"
) -> None:
    """After a reboot, or when the numbers have come round: another Python."""
    run_id = started(instance, python.pid)
    _, cursor = tick(instance)
    ((key, process),) = json.loads(cursor).items()
    boot, ticks = process.split()
    for other in (f"{boot} {int(ticks) - 1}", f"0{boot[1:]} {ticks}" if boot[0] != "0" else f"1{boot[1:]} {ticks}"):
        again = started(instance, python.pid)
        known = json.dumps({key: process, f"{again} {python.pid}": other})
        assert tick(instance, known)[0] == f"ended {again}"
    assert status(instance, run_id) == dg.DagsterRunStatus.STARTED


def test_another_program_under_the_number_of_a_run_that_no_tick_has_seen(instance: dg.DagsterInstance) -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        run_id = started(instance, process.pid)
        assert tick(instance)[0] == f"ended {run_id}"
        process.kill()


def test_a_zombie_is_gone(instance: dg.DagsterInstance, python: "subprocess.Popen[bytes]") -> None:
    run_id = started(instance, python.pid)
    _, cursor = tick(instance)
    python.kill()
    with open(f"/proc/{python.pid}/stat") as file:  # noqa: PTH123 - read again and again
        while file.seek(0) == 0 and file.read().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
    assert tick(instance, cursor)[0] == f"ended {run_id}"
