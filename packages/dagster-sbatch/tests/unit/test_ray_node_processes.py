"""The processes of a node of a Ray job: which are Ray's, and what is left when some of them are killed.

The node's program runs as srun runs it, after pre-start commands in the same shell, with a sham Ray.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import node
from dagster_sbatch.launchers import RayLauncher
from dagster_sbatch.slurm import SlurmRequest
from slurm_in_a_box import wait_until

import processes

SHAM_RAY = """
import atexit, os, subprocess, sys
DAEMON = '''
import os, signal, socket, sys, time

def leave(*_):
    with open("left", "a") as file:
        file.write(str(os.getpid()) + chr(10))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)

signal.signal(signal.SIGTERM, leave)
signal.signal(signal.SIGUSR1, lambda *_: os._exit(0))
server = socket.create_server(("", int(sys.argv[1])))
os.makedirs(sys.argv[2] + "/session_latest/logs", exist_ok=True)
with open("daemons", "a") as file:
    file.write(str(os.getpid()) + chr(10))
print("listens", flush=True)
time.sleep(600)
'''

def main():
    options = dict(word.split("=", 1) for word in sys.argv if "=" in word)
    temp_dir = options["--temp-dir"]
    for port in (options["--port"], "0"):
        daemon = [sys.executable, "-c", DAEMON, port, temp_dir]
        made = subprocess.Popen(daemon, stdout=subprocess.PIPE, start_new_session=True)
        made.stdout.readline()
    if not os.path.exists("failed-once"):
        open("failed-once", "w").close()
        return 1
    atexit.register(os.mkdir, "slow-end")
"""
SETTINGS: dict[str, Any] = {
    "cpus": 1, "gpus": 0, "temp_dir": None, "network_interface": "lo", "ray_start_args": [],
    "object_store_memory": None, "collect_logs": False,
}  # fmt: skip


class Started:
    """A node whose Ray has started, at the second try."""

    def __init__(self, folder: Path, shell: subprocess.Popen[bytes]) -> None:
        self.folder, self.shell = folder, shell

    @property
    def background(self) -> int:
        """The process that a pre-start command has left."""
        return int((self.folder / "background").read_text())

    @property
    def watcher(self) -> int:
        """The one of the node's two processes that watches Ray."""
        (found,) = (
            pid for pid in processes.children()[self.shell.pid] if "node.py" in Path(f"/proc/{pid}/cmdline").read_text()
        )
        return found

    @property
    def daemons(self) -> list[int]:
        """The processes of Ray, of both starts."""
        return [int(line) for line in (self.folder / "daemons").read_text().split()]

    @property
    def failure(self) -> str:
        with suppress(FileNotFoundError):
            return (self.folder / "ray/state/failed").read_text()
        return ""

    def is_clean(self) -> bool:
        return not any(map(is_running, self.daemons)) and not list((self.folder / "disk").iterdir())


def is_running(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Started]:
    (tmp_path / "sham_ray.py").write_text(SHAM_RAY)
    facts = tmp_path / "ray-2.60.0.dist-info"
    for folder in ("ray", "ray/state", "disk", facts.name):
        (tmp_path / folder).mkdir()
    (facts / "METADATA").write_text("Name: ray\nVersion: 2.60.0\n")
    (facts / "entry_points.txt").write_text("[console_scripts]\nray = sham_ray:main\n")
    for name, text in RayLauncher().files(SlurmRequest()).items():
        (tmp_path / name).write_text(text)
    (tmp_path / "ray/settings.json").write_text(json.dumps(SETTINGS))
    joined = tmp_path / "ray/state/joined-n1.json"
    for path in (tmp_path / "ray/state/head.json", joined):
        path.touch()
    environment = {
        "PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path), "SLURMD_NODENAME": "n1", "SLURM_PROCID": "0",
        "SLURM_JOB_ID": "7", "RAY_JOB_STATE": str(tmp_path / "ray/state"), "JOB_TMPDIR": str(tmp_path / "disk"),
    }  # fmt: skip
    command = ["bash", "-c", 'sleep 600 & echo $! >background; exec "$@"', "bash", sys.executable, "ray/node.py"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdin=subprocess.PIPE) as shell:
        made = Started(tmp_path, shell)
        try:
            wait_until(lambda: joined.read_text() or made.failure or shell.poll() is not None, "Ray has started", 60)
            assert joined.read_text(), made.failure
            yield made
        finally:
            shell.kill()
            for pid in (made.background, *made.daemons):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def test_what_a_prestart_command_leaves_in_the_background_is_not_rays(started: Started) -> None:
    """The second start of Ray has not killed it, and its end is no failure."""
    assert is_running(started.background)
    first, *others = started.daemons
    assert not is_running(first)
    os.kill(started.background, signal.SIGTERM)
    wait_until(lambda: not is_running(started.background), "the background process has ended")
    with pytest.raises(subprocess.TimeoutExpired):
        started.shell.wait(4 * node.WATCH_SECONDS)
    assert started.failure == ""
    assert any(map(is_running, others))


def test_nobody_waits_until_python_has_freed_what_ray_has_loaded(started: Started) -> None:
    assert not (started.folder / "slow-end").exists()


def test_a_first_start_that_failed_leaves_the_cluster(started: Started) -> None:
    """A process of Ray is asked to end before it is killed: so the head does not count its node for seconds more."""
    first = started.daemons[:2]
    assert sorted(map(int, (started.folder / "left").read_text().split())) == first
    assert not any(map(is_running, first))


def test_a_process_that_does_not_end_when_it_is_asked_to_is_killed() -> None:
    program = (
        "import processes, subprocess\n"
        "command = ['sh', '-c', 'trap : TERM; echo begun; while :; do sleep 600; done']\n"
        "silent = subprocess.Popen(command, stdout=subprocess.PIPE)\n"
        "silent.stdout.readline()\n"
        "processes.end_descendants(0.3)\n"
        "assert not processes.children().get(processes.os.getpid())\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=Path(node.__file__).parent, check=True, timeout=20)


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (signal.SIGTERM, "was killed by signal 15"),
        (signal.SIGKILL, "was killed by signal 9"),
        (signal.SIGUSR1, "ended with exit code 0"),
    ],
)
def test_a_process_of_ray_that_ends_is_a_failure(started: Started, end: signal.Signals, how: str) -> None:
    """SIGTERM and exit code 0, too: that is the `ray stop` of another job of the user."""
    os.kill(started.daemons[-1], end)
    assert started.shell.wait(60) == 1
    assert how in started.failure
    assert started.is_clean()
    assert not is_running(started.background)


KILLED: dict[str, Callable[[Started], int]] = {
    "the process that srun has started": lambda started: started.shell.pid,
    "the process that watches Ray": lambda started: started.watcher,
}


@pytest.mark.parametrize("which", KILLED)
def test_the_node_program_is_killed_and_nothing_is_left(which: str, started: Started) -> None:
    assert any(map(is_running, started.daemons))
    killed = KILLED[which](started)
    os.kill(killed, signal.SIGKILL)
    wait_until(started.is_clean, "no process and no folder of Ray")
    code = started.shell.wait(60)
    if killed == started.shell.pid:
        assert code == -signal.SIGKILL
    else:
        assert code == 1
        assert "Ray on n1: the process that watches Ray was killed by signal 9" in started.failure


@pytest.mark.parametrize("how", ["its standard input ends", "it gets SIGTERM"])
def test_the_node_program_ends_and_nothing_is_left(how: str, started: Started) -> None:
    if how == "it gets SIGTERM":
        started.shell.terminate()
    else:
        assert started.shell.stdin
        started.shell.stdin.close()
    assert started.shell.wait(60) == (143 if how == "it gets SIGTERM" else 0)
    assert started.is_clean()
    assert started.failure == ""


def test_a_program_of_any_user_may_have_any_name(tmp_path: Path) -> None:
    """Linux shows its first 15 bytes, which may end within a character."""
    path = tmp_path / "mein-Programm-ü"
    shutil.copy("/bin/sleep", path)
    with subprocess.Popen([path, "600"]) as program:
        try:
            assert b"(mein-Programm-\xc3)" in Path(f"/proc/{program.pid}/stat").read_bytes()
            assert program.pid in processes.children()[os.getpid()]
        finally:
            program.kill()
