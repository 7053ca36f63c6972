"""Forked runs in a real `dagster dev`: what webserver, daemon and run monitoring make of them."""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import chdir
from datetime import UTC, datetime

import dagster as dg
import psutil
import pytest

from dagster_sbatch.upkeep.ownership import group_state, repeat_failures
from support.dagster_dev import ENDED, DagsterDev, beside_location, gone, wait_for

pytestmark = pytest.mark.local
START_SECONDS = 200
"""A fork server may take 100 s to answer on a busy machine, and then a run starts by itself; Dagster allows 180 s."""

LOCATION = """\
import os, time
from pathlib import Path
import dagster as dg
VERSION = "first"

@dg.asset
def waiter(context: dg.AssetExecutionContext) -> None:
    folder = Path(os.environ["DATA_ROOT"])
    folder.mkdir(exist_ok=True)
    (folder / context.run_id).write_text(f"{os.getpid()} {os.getppid()}")
    while not (folder / "go").exists():
        time.sleep(0.05)
    print("version", VERSION)

defs = dg.Definitions(assets=[waiter], executor=dg.in_process_executor)
"""


@pytest.fixture(scope="module")
def dagster_dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DagsterDev]:
    """`dagster dev` whose monitoring looks every second."""
    folder = tmp_path_factory.mktemp("forked")
    (folder / "location.py").write_text(LOCATION)
    variables = {"HOME": str(folder), "DATA_ROOT": str(folder / "data")}

    def adapt(text: str) -> str:
        return text.replace("poll_interval_seconds: 30", "poll_interval_seconds: 1")

    with beside_location(folder / "location.py", folder / "project", variables, "waiting", adapt) as started:
        yield started


@pytest.fixture
def server(dagster_dev: DagsterDev) -> Iterator[DagsterDev]:
    """The same for all tests; the runs of one end before the next one begins."""
    go = dagster_dev.data_root / "go"
    go.unlink(missing_ok=True)
    yield dagster_dev
    go.parent.mkdir(exist_ok=True)
    go.touch()
    wait_for(lambda: set(stored(dagster_dev).values()) <= ENDED, START_SECONDS, "all runs have ended")


def stored(server: DagsterDev) -> dict[str, str]:
    """The state of each run by its id, also while the server is down."""
    with chdir(server.folder), dg.DagsterInstance.from_config(".") as instance:
        return {run.run_id: run.status.value for run in instance.get_runs()}


def start(server: DagsterDev, run_id: str | None = None) -> tuple[str, int, int]:
    """A run whose asset waits: its id, its pid and its fork server's."""
    run_id = run_id or server.launch("waiter", location="waiting")
    path = server.data_root / run_id
    wait_for(lambda: path.exists() and path.read_text(), START_SECONDS, f"run {run_id} waits")
    pid, parent = map(int, path.read_text().split())
    assert "fork_server.py" in " ".join(psutil.Process(parent).cmdline())
    return run_id, pid, parent


def retry_of(server: DagsterDev, run_id: str) -> str:
    """The retry of a run that has failed. If Dagster misses it, do as the sensor `cancel_orphaned_jobs`."""

    def find() -> str:
        with chdir(server.folder), dg.DagsterInstance.from_config(".") as instance:
            if group_state(instance, run_id, datetime.now(UTC)) == "retry missed":
                repeat_failures(instance, [run_id])
        return server.re_execution_of(run_id)

    return str(wait_for(find, 240, "it is retried"))


def output(server: DagsterDev, run_id: str) -> str:
    (path,) = (server.folder / ".dagster" / "compute_logs" / run_id).rglob("*.out")
    return path.read_text()


def test_an_edit_reaches_new_runs_only_and_needs_no_reload(server: DagsterDev) -> None:
    file = server.folder.parent / "location.py"
    old, _, parent = start(server)
    file.write_text(LOCATION.replace('"first"', '"second"'))
    new, _, same = start(server)
    assert parent == same
    (server.data_root / "go").touch()
    assert (server.wait(old), server.wait(new)) == ("SUCCESS", "SUCCESS")
    assert (output(server, old), output(server, new)) == ("version first\n", "version second\n")


def test_a_run_that_is_killed_with_its_fork_server_is_found_and_retried(server: DagsterDev) -> None:
    run_id, pid, parent = start(server)
    for each in (parent, pid):  # the server first: it would report the run
        os.kill(each, signal.SIGKILL)
    wait_for(lambda: server.status(run_id) == "FAILURE", 240, "run monitoring fails the run")
    assert any(f"Process {pid} of this run is gone" in text for text in server.messages(run_id))
    _, _, another = start(server, retry_of(server, run_id))
    assert another != parent


def test_after_a_power_cut_history_is_kept_and_a_run_that_was_not_forked_is_retried(server: DagsterDev) -> None:
    go, launcher = server.data_root / "go", server.folder / ".dagster" / "run_launcher"
    go.parent.mkdir(exist_ok=True)
    go.touch()
    done = server.launch("waiter", location="waiting")
    assert server.wait(done) == "SUCCESS"
    stored = server.materializations("waiter")
    go.unlink()
    os.kill(int((server.data_root / done).read_text().split()[1]), signal.SIGKILL)
    shutil.rmtree(launcher)
    launcher.touch()  # then no other fork server can be started
    run_id = server.launch("waiter", location="waiting")
    path = server.data_root / run_id
    wait_for(lambda: path.exists() and path.read_text(), START_SECONDS, f"run {run_id} waits")
    pid, parent = map(int, path.read_text().split())
    assert "fork_server.py" not in " ".join(psutil.Process(parent).cmdline())
    launcher.unlink()
    server.kill()
    wait_for(lambda: gone(pid), 60, "the run has been killed, too")
    server.start()
    assert (server.status(done), server.materializations("waiter")) == ("SUCCESS", stored)
    wait_for(lambda: server.status(run_id) == "FAILURE", 240, "run monitoring fails the run")
    assert any(f"Process {pid} of this run is gone" in text for text in server.messages(run_id))
    retry = retry_of(server, run_id)
    go.touch()
    assert server.wait(retry) == "SUCCESS"
    kept = {path.name for path in server.folder.iterdir() if not path.name.startswith(".tmp_dagster_home_")}
    assert kept == {".dagster", "dagster.yaml", "workspace.yaml"}


def test_runs_end_with_dagster_dev_by_ctrl_c_and_outlive_its_kill(server: DagsterDev) -> None:
    """As Dagster's default launcher has it: Ctrl-C reaches runs, SIGTERM to `dagster dev` alone does not."""
    survivor, pid, parent = start(server)
    server.terminate_alone()
    assert not gone(pid)
    server.start()
    assert server.status(survivor) == "STARTED"
    other, other_pid, other_parent = start(server)
    assert other_parent != parent
    server.terminate(survivor)
    assert server.wait(survivor) == "CANCELED"
    wait_for(lambda: gone(parent), 60, "the first fork server has ended with its last run")
    server.stop()
    wait_for(lambda: gone(other_pid) and gone(other_parent), 60, "Ctrl-C has ended the run and its fork server")
    assert stored(server)[other] == "FAILURE"
