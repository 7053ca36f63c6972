"""Runs as forks of a fork server: real servers and runs, started through Dagster's instance as its daemon does it."""

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch.run_launcher import fork_client, fork_server, launcher
from dagster_sbatch.run_launcher.fork_client import ForkServers, RunProcess
from dagster_sbatch.run_launcher.fork_server import LOG
from support.dagster_dev import gone, wait_for
from support.forked_runs import JOBS, Runs

pytestmark = pytest.mark.local
STATUS = dg.DagsterRunStatus


def replaced(process: RunProcess) -> list[RunProcess]:
    """Other processes under the same number: after it was used again, and after a reboot."""
    boot, ticks = process.begin.split()
    return [RunProcess(process.pid, f"{boot} {int(ticks) - 1}"), RunProcess(process.pid, f"{boot[::-1]} {ticks}")]


def test_a_run_is_like_one_that_dagster_starts(runs: Runs) -> None:
    """It has the variables, the group and the folder of Dagster; nothing of the server's, and no secret in `ps`."""
    seen = runs.seen(runs.launch("reporting"))
    started_by_dagster = {**os.environ, "SF_PARTNER": seen["variables"].get("SF_PARTNER")}
    assert seen["variables"] == started_by_dagster
    assert (seen["folder"], seen["group"], seen["threads"]) == (str(Path.cwd()), os.getpgrp(), 1)
    assert seen["path"][0] == str(Path.cwd())
    assert str(Path(fork_server.__file__).parent) not in seen["path"]
    assert "instance" not in seen["command"]
    assert "nobody" not in seen["command"]
    (server,) = (Path(f"/proc/{each.pid}/fd") for each in runs.servers())
    shared = set(seen["descriptors"]) & {str(each.readlink()) for each in server.iterdir()}
    assert [each for each in shared if each.startswith("socket:") or each.endswith(LOG)] == []


def test_launches_at_once_share_one_server_which_has_one_thread_and_nothing_open(runs: Runs) -> None:
    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(runs.launch, ["reporting"] * 4))
    seen, (server,) = [runs.seen(run_id) for run_id in ids], runs.servers()
    assert {each["parent"] for each in seen} == {server.pid}
    assert len({each["random"] for each in seen}) == len(ids)
    assert server.num_threads() == 1
    assert server.net_connections() == [] or all(each.family == socket.AF_UNIX for each in server.net_connections())
    assert [each.path for each in server.open_files() if each.path.endswith((".db", ".sqlite"))] == []
    assert "numpy" not in Path(f"/proc/{server.pid}/maps").read_text()
    for run_id in ids:
        runs.wait(run_id)


def test_a_run_that_is_terminated(runs: Runs) -> None:
    run_id = runs.launch("waiting")
    runs.seen(run_id)
    assert runs.instance.run_launcher.terminate(run_id)
    runs.wait(run_id, STATUS.CANCELED)
    assert not runs.instance.run_launcher.terminate(run_id)
    wait_for(lambda: not runs.process(run_id).alive, 60, "its process has ended")


def test_terminate_ends_a_run_whose_process_is_gone_and_no_other_process(runs: Runs) -> None:
    """A process that has got the number of a run after a reboot, or that ran under it before, is left alone."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as other:
        process = RunProcess.find(other.pid)
        assert process
        for former in replaced(process):
            run_id = runs.new("reporting")
            runs.instance.add_run_tags(run_id, former.tags(run_id))
            assert runs.health(run_id) == "NOT_FOUND"
            assert runs.instance.run_launcher.terminate(run_id)
            assert runs.status(run_id) == STATUS.CANCELED
        retry = runs.new("reporting")
        runs.instance.add_run_tags(retry, process.tags("the-run-before"))
        assert runs.health(retry) == "RUNNING"  # it has no process yet
        assert not runs.instance.run_launcher.terminate(retry)
        assert other.poll() is None
        other.kill()


def test_a_run_that_crashes_fails_at_once(runs: Runs) -> None:
    run_id = runs.launch("dying")
    runs.wait(run_id, STATUS.FAILURE)
    texts = [entry.message or entry.user_message for entry in runs.instance.all_logs(run_id)]
    assert any("has ended unexpectedly by signal 9" in text for text in texts)
    assert runs.health(run_id) == "NOT_FOUND"


def test_a_server_that_is_killed_loses_no_run(runs: Runs) -> None:
    """Its runs are still watched and terminated, and the next launch starts another server."""
    before = runs.launch("waiting")
    parent = runs.seen(before)["parent"]
    os.kill(parent, signal.SIGKILL)
    wait_for(lambda: gone(parent), 60, "the server is gone")
    after = runs.launch("reporting")
    runs.wait(after)
    assert runs.seen(after)["parent"] != parent
    assert runs.health(before) == "RUNNING"
    assert runs.instance.run_launcher.terminate(before)
    runs.wait(before, STATUS.CANCELED)


def test_a_server_retires_when_something_that_it_has_imported_changes(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old runs keep what they have; new ones get a new server; the old one ends with its last run."""
    customize = runs.folder / "imported" / "sitecustomize.py"
    customize.parent.mkdir()
    customize.write_text("")
    monkeypatch.setenv("PYTHONPATH", f"{customize.parent}:{JOBS.parents[1]}")
    old = runs.launch("waiting")
    runs.seen(old)
    customize.write_text("import os\nos.environ['UPGRADED'] = 'yes'\n")
    new = runs.launch("reporting")
    assert runs.seen(new)["variables"]["UPGRADED"] == "yes"
    assert len(runs.servers()) == 2
    (runs.reports / "go").touch()
    runs.wait(old)
    wait_for(lambda: len(runs.servers()) == 1, 60, "the old server has ended")
    assert f"retires: {customize} has changed; runs left: 1" in runs.log


def test_other_variables_have_another_server(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    first = runs.seen(runs.launch("reporting"))
    monkeypatch.setenv("DAGSTER_DEPLOYMENT", "production_supercomputer")
    second = runs.seen(runs.launch("reporting"))
    assert second["variables"]["DAGSTER_DEPLOYMENT"] == "production_supercomputer"
    assert first["parent"] != second["parent"]


def test_a_location_with_a_python_of_its_own_that_lacks_this_package(runs: Runs) -> None:
    folder = runs.folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (own,) = (path for path in map(Path, sys.path) if path.name == "site-packages")
    for each in own.iterdir():
        if "sbatch" not in each.name and each.suffix != ".pth":
            (packages / each.name).symlink_to(each)
    python = str(folder / "bin" / "python")
    code = "import importlib.util as u; print(u.find_spec('dagster_sbatch'))"
    assert subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True).stdout == "None\n"
    run_id = runs.launch("reporting", python)
    assert runs.seen(run_id)["python"] == python
    runs.wait(run_id)


def test_a_launch_that_breaks_off_has_started_nothing(runs: Runs) -> None:
    """Dagster dies after the fork, before the run's tag is stored: nobody could find that process."""
    runs.wait(runs.launch("reporting"))
    run_id = runs.new("reporting")
    reports = len(list(runs.reports.glob("*.json")))
    forked = ForkServers(runs.base).fork(sys.executable, run_id, "{}")
    with forked.connection:
        assert forked.process.alive
    wait_for(lambda: not forked.process.alive, 60, "the process has ended")
    assert len(list(runs.reports.glob("*.json"))) == reports
    assert runs.status(run_id) == STATUS.NOT_STARTED


def test_a_run_that_is_terminated_while_it_is_launched(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    add = dg.DagsterInstance.add_run_tags

    def add_and_terminate(instance: dg.DagsterInstance, run_id: str, tags: dict[str, str]) -> None:
        run = instance.get_run_by_id(run_id)
        assert run
        instance.report_run_canceling(run)
        add(instance, run_id, tags)

    monkeypatch.setattr(dg.DagsterInstance, "add_run_tags", add_and_terminate)
    run_id = runs.launch("reporting")
    assert runs.status(run_id) == STATUS.CANCELED
    wait_for(lambda: not runs.process(run_id).alive, 60, "its process has ended")
    assert list(runs.reports.glob("*.json")) == []


def test_a_server_ends_when_nobody_needs_it(runs: Runs) -> None:
    """Its Dagster process is gone, without a word about the server that it left, and so is its last run."""
    script = """
import sys
from pathlib import Path
from dagster_sbatch.run_launcher.fork_client import ForkServers
forked = ForkServers(Path(sys.argv[1])).fork(sys.executable, "a-run", "{}")
with forked.connection:
    print(forked.process.pid)
"""
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", script, str(runs.base)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0
    assert done.stderr == ""
    wait_for(lambda: runs.servers() == [], 60, "the server has ended")
    assert "the process that has started it is gone" in runs.log


@pytest.mark.parametrize("fault", ["no such Python", "no folder", "a server that ends", "a server that hangs"])
def test_without_a_server_dagsters_default_launcher_starts_the_run(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    started = []

    def start(_: dg.DefaultRunLauncher, context: Any) -> None:
        started.append(context.dagster_run.run_id)

    monkeypatch.setattr(dg.DefaultRunLauncher, "launch_run", start)
    python = sys.executable
    if fault == "no such Python":
        python = "/no/such/python"
    elif fault == "no folder":
        runs.base.write_text("in its place")
    elif fault == "a server that ends":
        monkeypatch.setenv("PYTHONPATH", str(runs.folder))
        (runs.folder / "sitecustomize.py").write_text("import os; os._exit(1)")
    else:
        monkeypatch.setattr(fork_client, "ANSWER_SECONDS", 0.01)
    run_id = runs.launch("reporting", python)
    assert started == [run_id]
    texts = [entry.message or entry.user_message for entry in runs.instance.all_logs(run_id)]
    assert any("The fork server cannot start a run" in text and "default launcher" in text for text in texts)
    assert list(runs.reports.glob("*.json")) == []


def test_where_nothing_can_be_forked_dagsters_default_launcher_starts_the_run(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "CAN_FORK", False)
    with pytest.raises(dg.DagsterInvariantViolationError, match="DefaultRunLauncher requires a workspace"):
        runs.launch("reporting")
    assert not runs.base.exists()


def test_with_fork_false_dagsters_default_launcher_starts_the_run(tmp_path: Path) -> None:
    config = {"base_dir": str(tmp_path / "base"), "fork": False}
    launcher = {"module": "dagster_sbatch", "class": "ForkingRunLauncher", "config": config}
    with (
        dg.instance_for_test(overrides={"run_launcher": launcher}) as instance,
        pytest.raises(dg.DagsterInvariantViolationError, match="DefaultRunLauncher requires a workspace"),
    ):
        Runs(instance, tmp_path).launch("reporting")
    assert not (tmp_path / "base").exists()


def test_the_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
import socket, sys
from pathlib import Path
from dagster_sbatch.run_launcher import fork_server
fork_server.LOG_BYTES = 1000
server = fork_server.Server(socket.socket(), Path(sys.argv[1]))
for _ in range(100):
    server.log("x" * 100)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("fork-server*")}
    assert set(sizes) == {LOG, f"{LOG}.old"}
    assert all(0 < size < 1300 for size in sizes.values())
