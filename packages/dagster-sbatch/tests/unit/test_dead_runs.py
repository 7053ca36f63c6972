"""Which runs count as dead: by their process, and never by the clock, which may be set at any time."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.code_pointer import ModuleCodePointer
from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin

from dagster_sbatch.run_launcher.fork_client import RunProcess

SLEEP = "import time; time.sleep(600)"
POINTER = ModuleCodePointer(__name__, "nothing", None)


@dg.job
def nothing() -> None:
    """No op."""


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    launcher = {"module": "dagster_sbatch", "class": "ForkingRunLauncher", "config": {"base_dir": str(tmp_path)}}
    with dg.instance_for_test(overrides={"run_launcher": launcher, "run_monitoring": {"enabled": True}}) as made:
        yield made


@pytest.fixture
def python() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen([sys.executable, "-c", SLEEP]) as process:
        yield process
        process.kill()


def started(instance: dg.DagsterInstance, pid: int, seconds_ago: float = 0, image: str | None = None) -> str:
    """A run that a process began so long ago by the clock, perhaps in a container; its id."""
    code = JobPythonOrigin("nothing", RepositoryPythonOrigin(sys.executable, POINTER, image))
    run = instance.create_run_for_job(nothing, status=dg.DagsterRunStatus.STARTING, job_code_origin=code)
    event = dg.DagsterEvent(
        event_type_value=dg.DagsterEventType.RUN_START.value, job_name=run.job_name, message="", pid=pid
    )
    entry = dg.EventLogEntry(  # type: ignore[no-untyped-call]
        error_info=None, user_message="", level="info", run_id=run.run_id, timestamp=time.time() - seconds_ago,
        job_name=run.job_name, dagster_event=event,
    )  # fmt: skip
    instance.handle_new_event(entry)
    return run.run_id


def health(instance: dg.DagsterInstance, run_id: str) -> str:
    """What Dagster's run monitoring learns about a run."""
    run = instance.get_run_by_id(run_id)
    assert run
    assert run.status == dg.DagsterRunStatus.STARTED
    return instance.run_launcher.check_run_worker_health(run).status.value


@pytest.mark.parametrize("seconds", [-3600, 0, 60, 86400])
def test_a_clock_that_is_set_ends_no_run(
    instance: dg.DagsterInstance, python: "subprocess.Popen[bytes]", seconds: float
) -> None:
    run_id = started(instance, python.pid, seconds)
    for _ in range(2):
        assert health(instance, run_id) == "RUNNING"
    python.kill()
    python.wait()
    assert health(instance, run_id) == "NOT_FOUND"


def test_another_process_under_the_same_number_is_not_the_runs(
    instance: dg.DagsterInstance, python: "subprocess.Popen[bytes]"
) -> None:
    """After a reboot, or when the numbers have come round: another Python."""
    process = RunProcess.find(python.pid)
    assert process
    boot, ticks = process.begin.split()
    for other in (f"{boot} {int(ticks) - 1}", f"0{boot[1:]} {ticks}" if boot[0] != "0" else f"1{boot[1:]} {ticks}"):
        run_id = started(instance, python.pid)
        assert health(instance, run_id) == "RUNNING"
        instance.add_run_tags(run_id, RunProcess(python.pid, other).tags(run_id))
        assert health(instance, run_id) == "NOT_FOUND"


def test_another_program_under_the_number_of_a_run_may_have_any_name(
    instance: dg.DagsterInstance, python: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    """Linux shows its first 15 bytes, which may end within a character."""
    path = tmp_path / "mein-Programm-ü"
    shutil.copy("/bin/sleep", path)
    run_id = started(instance, python.pid)
    assert health(instance, run_id) == "RUNNING"
    with subprocess.Popen([path, "600"]) as program:
        instance.add_run_tags(run_id, RunProcess(program.pid, "another boot 1").tags(run_id))
        try:
            assert health(instance, run_id) == "NOT_FOUND"
        finally:
            program.kill()


def test_another_program_under_the_number_of_a_run_that_was_never_checked(instance: dg.DagsterInstance) -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        run_id = started(instance, process.pid)
        assert health(instance, run_id) == "NOT_FOUND"
        process.kill()


def test_a_process_in_a_container_is_not_on_this_machine(instance: dg.DagsterInstance) -> None:
    run_id = started(instance, pid=1 << 22, image="an-image")  # no machine has that number
    assert health(instance, run_id) == "RUNNING"


def test_a_zombie_is_gone(instance: dg.DagsterInstance, python: "subprocess.Popen[bytes]") -> None:
    run_id = started(instance, python.pid)
    assert health(instance, run_id) == "RUNNING"
    python.kill()
    with open(f"/proc/{python.pid}/stat") as file:  # noqa: PTH123 - read again and again
        while file.seek(0) == 0 and file.read().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
    assert health(instance, run_id) == "NOT_FOUND"


def test_a_process_that_ends_while_it_is_examined_is_gone(
    python: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch
) -> None:
    read_text = Path.read_text

    def read(path: Path, errors: str | None = None) -> str:
        if path.name != "stat":
            return read_text(path, errors=errors)
        with path.open() as file:
            python.kill()
            python.wait()
            return file.read()

    monkeypatch.setattr(Path, "read_text", read)
    assert RunProcess.find(python.pid) is None
