"""Ends of forked runs at awkward moments: each is reported once, and as what it is."""

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest
from dagster._core.launcher import LaunchRunContext
from dagster._core.remote_origin import GrpcServerCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin

from dagster_sbatch.run_launcher import fork_client
from dagster_sbatch.run_launcher.fork_client import ForkServers, ForkServerUnavailableError
from dagster_sbatch.run_launcher.fork_server import LOG
from support.dagster_dev import gone, wait_for
from support.forked_runs import JOBS, STATUS, Runs

pytestmark = pytest.mark.local


def test_a_late_fork_does_not_fail_the_run_that_the_default_launcher_has_started(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server answers when the client has given up: that process ends, and the run's own continues."""
    runs.wait(runs.launch("reporting"))
    (server,) = runs.servers()
    monkeypatch.setattr(dg.DefaultRunLauncher, "launch_run", lambda *_: None)
    monkeypatch.setattr(fork_client, "ANSWER_SECONDS", 0.1)
    server.suspend()
    run_id = runs.launch("reporting")
    server.resume()
    wait_for(lambda: f"run {run_id}: process " in runs.log, 60, "the late process has ended")
    wait_for(lambda: runs.log.count(f"run {run_id}: ") == 2, 60, f"its end is judged; {runs.log}")
    assert runs.status(run_id) == STATUS.STARTING


def test_a_run_that_is_terminated_before_its_first_step_is_canceled(runs: Runs) -> None:
    hold = runs.reports / "hold"
    hold.touch()
    run_id = runs.launch("reporting")
    assert runs.status(run_id) == STATUS.STARTING
    assert runs.instance.run_launcher.terminate(run_id)
    hold.unlink()
    wait_for(lambda: runs.log.count(f"run {run_id}: ") == 2, 60, f"its end is judged; {runs.log}")
    assert runs.status(run_id) == STATUS.CANCELED
    assert list(runs.reports.glob("*.json")) == []


def test_a_run_that_begins_while_it_is_terminated_is_canceled(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its RUN_START sets its status to STARTED after RUN_CANCELING: only an interrupt lets it end its job."""
    report, hold = dg.DagsterInstance.report_run_canceling, runs.reports / "hold"

    def report_and_begin(instance: dg.DagsterInstance, run: dg.DagsterRun) -> None:
        began_now = hold.exists()
        if began_now:
            hold.unlink()
            runs.seen(run.run_id)
        report(instance, run)
        if began_now:
            start = dg.DagsterEvent(dg.DagsterEventType.RUN_START.value, run.job_name)
            instance.report_dagster_event(start, run.run_id)

    hold.touch()
    run_id = runs.launch("waiting")
    monkeypatch.setattr(dg.DagsterInstance, "report_run_canceling", report_and_begin)
    assert runs.instance.run_launcher.terminate(run_id)
    runs.wait(run_id, STATUS.CANCELED)


def test_a_run_that_dies_while_it_is_canceled_is_not_retried(runs: Runs) -> None:
    run_id = runs.launch("waiting")
    runs.seen(run_id)
    run = runs.instance.get_run_by_id(run_id)
    assert run
    runs.instance.report_run_canceling(run)
    os.kill(runs.process(run_id).pid, signal.SIGKILL)
    wait_for(lambda: runs.status(run_id) != STATUS.CANCELING, 60, "its end is reported")
    assert runs.status(run_id) == STATUS.CANCELED


def test_an_end_that_cannot_be_reported_is_in_the_log(runs: Runs) -> None:
    forked = ForkServers(runs.base).fork(sys.executable, "a-run", "{}")
    with forked.connection:
        os.kill(forked.process.pid, signal.SIGKILL)
        text = f"run a-run: the end of process {forked.process.pid} cannot be reported: "
        wait_for(lambda: text in runs.log, 60, f"the log has the error; {runs.log}")


def test_a_reporter_that_hangs_does_not_look_like_a_server(tmp_path: Path) -> None:
    """It has neither the control, whose client would wait for it, nor the server's handler of SIGTERM."""
    script = """
import os, signal, socket, sys, time
from pathlib import Path
from dagster_sbatch.run_launcher import fork_server
folder = Path(sys.argv[1])
ours, control = socket.socketpair()

def hang(*_):
    (folder / "part").write_text(str(os.getpid()))
    (folder / "part").rename(folder / "reporter")
    time.sleep(600)

fork_server._report_crash = hang
server = fork_server.Server(control, folder)
pid = os.fork()
if pid == 0:
    os._exit(1)
server.runs[pid] = {"run_id": "a-run", "arguments": ""}
ours.close()  # so it retires
server.serve()
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command) as server:
        wait_for((tmp_path / "reporter").exists, 60, "the reporter runs")
        pid = int((tmp_path / "reporter").read_text())
        held = [str(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir()]
        os.kill(pid, signal.SIGTERM)
        server.wait(60)
    wait_for(lambda: gone(pid), 60, "SIGTERM has ended the reporter")
    assert [each for each in held if each.startswith("socket:")] == []


def test_a_server_that_can_never_fork_is_asked_once(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something starts a thread in each Python. The reason is in the run's log, and the next run does not wait."""
    customize = runs.folder / "imported" / "sitecustomize.py"
    customize.parent.mkdir()
    customize.write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=[600], daemon=True).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{customize.parent}:{JOBS.parents[1]}")
    started = []
    monkeypatch.setattr(
        dg.DefaultRunLauncher, "launch_run", lambda _, context: started.append(context.dagster_run.run_id)
    )
    ids = [runs.launch("reporting") for _ in range(2)]
    assert started == ids
    for run_id in ids:
        assert any("it has 2 threads" in entry.message for entry in runs.instance.all_logs(run_id))
    assert runs.log.count(": ready after ") == 1


@pytest.mark.parametrize("python", ["true", "no-such-program"])
def test_servers_that_end_leave_nothing_open(tmp_path: Path, python: str) -> None:
    """A daemon that runs for months starts one per run: each ends when it has had no run for ten minutes."""
    gc.collect()  # other tests' files, too
    servers, before = ForkServers(tmp_path), psutil.Process().num_fds()
    for _ in range(3):
        with pytest.raises(ForkServerUnavailableError):
            servers.fork(python, "a-run", "{}")
    assert psutil.Process().num_fds() <= before + 1
    del servers
    gc.collect()
    assert psutil.Process().num_fds() <= before


@pytest.mark.parametrize(
    ("server", "forked"),
    [
        ({"host": "localhost", "port": 4000}, True),
        ({"host": "127.0.0.1", "port": 4000}, True),
        ({"host": "localhost", "socket": "/run/code.sock"}, True),
        ({"host": "code.example.org", "port": 4000}, False),
        ({"host": "192.0.2.7", "port": 4000}, False),
    ],
)
def test_the_run_of_a_location_on_another_host_is_not_executed_here(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, server: dict[str, Any], forked: bool
) -> None:
    asked = []

    def fork(*_: object) -> None:
        asked.append("fork")
        raise ForkServerUnavailableError

    monkeypatch.setattr(ForkServers, "fork", fork)
    monkeypatch.setattr(dg.DefaultRunLauncher, "launch_run", lambda *_: asked.append("default"))
    location = GrpcServerCodeLocationOrigin(**server)
    origin = RemoteJobOrigin(RemoteRepositoryOrigin(location, "__repository__"), "reporting")
    run = runs.instance.get_run_by_id(runs.new("reporting"))
    assert run
    context = LaunchRunContext(run.with_job_origin(origin), workspace=None)
    runs.instance.run_launcher.launch_run(context)
    assert asked == (["fork", "default"] if forked else ["default"])


def test_servers_share_a_log_that_another_one_renames(tmp_path: Path) -> None:
    script = """
import socket, sys
from pathlib import Path
from dagster_sbatch.run_launcher import fork_server
folder = Path(sys.argv[1])
server = fork_server.Server(socket.socket(), folder)
log = folder / fork_server.LOG
server.log("one")
log.rename(folder / "old")
server.log("two")
log.rename(folder / "older")
log.touch()
server.log("three")
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    texts = {path.name: path.read_text().rpartition(": ")[2] for path in tmp_path.iterdir()}
    assert texts == {"old": "one\n", "older": "two\n", LOG: "three\n"}
