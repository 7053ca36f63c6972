"""A command on this machine, as `LocalProcess` follows it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from dagster_sbatch.run.local import LocalProcess
from dagster_sbatch.slurm.gateway.agent.transfer import CHUNK
from slurm_in_a_box import wait_until
from support.dagster_dev import gone


def test_how_long_it_ran_does_not_include_what_its_output_costs_us(tmp_path: Path) -> None:
    slow = 0.5

    def store(data: bytes) -> None:
        """As a database that takes its time."""
        wait_until(lambda: gone(int(data)), "the command has ended", 60)
        time.sleep(slow)

    begun = time.monotonic()
    command = [sys.executable, "-c", "import os; print(os.getpid())"]
    ended = LocalProcess(command, os.environ, tmp_path, {"stdout": store}).run(threading.Event())
    assert ended.exit_code == 0
    assert 0 < ended.seconds <= time.monotonic() - begun - slow


CHILD = """
import pathlib, subprocess, sys, time
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
pathlib.Path(sys.argv[1] + ".part").write_text(str(child.pid))
pathlib.Path(sys.argv[1] + ".part").rename(sys.argv[1])
time.sleep(600)
"""
"""A workload with a child in a session of its own."""
STEP = """
import os, pathlib, sys, threading
from dagster_sbatch.run.local import LocalProcess
folder, *command = sys.argv[1:]
LocalProcess(command, os.environ, pathlib.Path(folder), {}).run(threading.Event())
"""


def test_a_workload_that_is_terminated_leaves_nothing_running(tmp_path: Path) -> None:
    pid, stop = tmp_path / "pid", threading.Event()

    def terminate() -> None:
        wait_until(pid.exists, "the child runs", 60)
        stop.set()

    threading.Thread(target=terminate).start()
    ended = LocalProcess([sys.executable, "-c", CHILD, str(pid)], os.environ, tmp_path, {}).run(stop)
    assert ended.exit_code == -signal.SIGTERM
    wait_until(lambda: gone(int(pid.read_text())), "the child has ended")


def test_nothing_outlives_a_step_that_was_killed(tmp_path: Path) -> None:
    pid, folder = tmp_path / "pid", tmp_path / "run"
    folder.mkdir()
    command = [sys.executable, "-c", STEP, str(folder), sys.executable, "-c", CHILD, str(pid)]
    with subprocess.Popen(command) as step:
        wait_until(pid.exists, "the child runs", 60)
        step.kill()
    wait_until(lambda: gone(int(pid.read_text())), "the child has ended")
    wait_until(lambda: not folder.exists(), "the run directory is gone")


WRITER = """
import pathlib, sys
for number in range(sys.maxsize):
    pathlib.Path(f"{number}.part").touch()
    if number == 1000:
        pathlib.Path(sys.argv[1]).touch()
"""
"""A workload that writes into its run directory all the time."""


def test_the_run_directory_goes_though_the_workload_writes_into_it(tmp_path: Path) -> None:
    writes, folder = tmp_path / "writes", tmp_path / "run"
    folder.mkdir()
    command = [sys.executable, "-c", STEP, str(folder), sys.executable, "-c", WRITER, str(writes)]
    with subprocess.Popen(command) as step:
        wait_until(writes.exists, "the workload writes", 60)
        (supervisor,) = psutil.Process(step.pid).children()
        step.kill()
    wait_until(lambda: gone(supervisor.pid), "the supervisor has ended")
    assert not folder.exists()


CHATTER = """
import os, time
until = time.monotonic() + 20
open("../pid", "w").write(str(os.getpid()))
while time.monotonic() < until:
    print(".", end="", flush=True)
"""
"""A workload that writes faster than its output is stored, and ends by itself."""


def test_a_workload_that_writes_faster_than_its_output_is_stored_can_be_terminated(tmp_path: Path) -> None:
    stop, written, stored = threading.Event(), tmp_path / "stdout", 0

    def store(data: bytes) -> None:
        """As a database that takes its time: there is more to store afterwards, while the workload runs."""
        nonlocal stored
        stored += len(data)
        stop.set()
        pid = int((tmp_path / "pid").read_text())
        wait_until(lambda: written.stat().st_size > stored or gone(pid), "more is written", 60)

    ended = LocalProcess([sys.executable, "-c", CHATTER], os.environ, tmp_path, {"stdout": store}).run(stop)
    assert ended.exit_code == -signal.SIGTERM


BACKLOG = f"""
import os, time
with open("../pid", "w") as file:
    file.write(str(os.getpid()))
with open("../written", "wb") as file:
    file.write(bytes({3 * CHUNK}))
os.rename("../written", "../messages")
time.sleep(600)
"""
"""A workload that has written much more than was stored."""


def test_a_workload_is_terminated_before_all_that_it_has_written_is_stored(tmp_path: Path) -> None:
    stop, ran, sizes = threading.Event(), [], []

    def store(data: bytes) -> None:
        stop.set()
        ran.append(not gone(int((tmp_path / "pid").read_text())))
        sizes.append(len(data))

    LocalProcess([sys.executable, "-c", BACKLOG], os.environ, tmp_path, {"messages": store}).run(stop)
    assert (ran, sum(sizes)) == ([True, False, False], 3 * CHUNK)


EMPTIES = """\
echo 'a first line' >&2
until [ -e ../read ]; do sleep 0.01; done
echo 'a second line' >/dev/stderr
"""
"""A workload whose shell empties the file."""


def test_what_a_workload_writes_after_it_has_emptied_its_output_comes(tmp_path: Path) -> None:
    come = bytearray()

    def store(data: bytes) -> None:
        come.extend(data)
        (tmp_path / "read").touch()

    LocalProcess(["bash", "-c", EMPTIES], os.environ, tmp_path, {"stderr": store}).run(threading.Event())
    assert come.decode() == "a first line\na second line\n"


@pytest.mark.parametrize(
    "last", ["shutil.rmtree(os.path.dirname(os.getcwd()))", "os.mkdir('end')", "sys.exit(3)", "os.abort()"]
)
def test_how_a_workload_has_ended_does_not_depend_on_its_run_directory(last: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    command = [sys.executable, "-c", f"import os, shutil, sys\n{last}"]
    ended = LocalProcess(command, os.environ, folder, {}).run(threading.Event())
    assert ended.exit_code == {"sys.exit(3)": 3, "os.abort()": -signal.SIGABRT}.get(last, 0)
    assert ended.seconds > 0


def test_a_group_that_has_ended_is_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS, a signal for a group of zombies fails with EPERM."""
    process = LocalProcess([sys.executable, "-c", ""], os.environ, tmp_path, {})
    process.wait(60)

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "killpg", refuse)
    process.send(signal.SIGTERM)
    assert process.end().exit_code == 0


def test_a_long_cause_is_cut(tmp_path: Path) -> None:
    """A rank may have written megabytes without a line end."""
    code = "open('../cause', 'w').write('why: ' + 'x' * (1 << 20)); raise SystemExit(3)"
    ended = LocalProcess([sys.executable, "-c", code], os.environ, tmp_path, {}).run(threading.Event())
    assert ended.cause.startswith("why: xxx")
    assert ended.cause.endswith("xxx\n[... 1038581 characters left out ...]")
    assert len(ended.cause) < 11_000
