"""The fork servers of a Dagster process, which starts them and asks them for the processes of runs; a run's process."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
import weakref
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import psutil

from dagster_sbatch.run_launcher import fork_server

ANSWER_SECONDS = 100.0
"""Within which a fork server answers, the time to start it included. Dagster gives a run 180 s to start."""
ATTEMPTS = 3  # at an answer: a server may have ended, or have retired because of new code, between two requests
UNFIT_SECONDS = 300.0  # before a server is started again, after one that could never fork
PROC = Path("/proc")
KILL_SECONDS = 5.0
"""Within which a killed process ends, unless it waits for a disk; it executes nothing more in any case."""


class ForkServerUnavailableError(Exception):
    """No fork server has answered; the text says where its log is."""


@dataclass(frozen=True)
class RunProcess:
    """The process of a run: what identifies it, also after a reboot and when its number has been used again."""

    pid: int  # its number
    begin: str  # when it began: the boot of the machine and clock ticks after it; not on Linux, by the clock

    @classmethod
    def find(cls, pid: int) -> "RunProcess | None":
        """Return the process that has this number now; None if there is none, or if it has ended (a zombie)."""
        try:
            process = psutil.Process(pid)
            return None if process.status() == psutil.STATUS_ZOMBIE else cls(pid, _begin(process))
        except (psutil.Error, FileNotFoundError, ProcessLookupError):  # another user's; or it has just ended
            return None

    @classmethod
    def of(cls, run: dg.DagsterRun) -> "RunProcess | None":
        """Return the process that `ForkingRunLauncher` has forked for a run; None if it has not."""
        run_id, _, process = run.tags.get(fork_server.PROCESS_TAG, "").partition(" ")
        pid, _, begin = process.partition(" ")
        return cls(int(pid), begin) if run_id == run.run_id else None

    def tags(self, run_id: str) -> dict[str, str]:
        """Return the tags by which `of` finds this process."""
        return {fork_server.PROCESS_TAG: f"{run_id} {self.pid} {self.begin}"}

    def interrupt(self) -> bool:
        """Send SIGINT to the process; return False if it is gone."""
        return self._send(signal.SIGINT)

    def kill(self) -> None:
        """End the process by SIGKILL, and wait until it has ended."""
        self._send(signal.SIGKILL)
        deadline = time.monotonic() + KILL_SECONDS
        while self.alive and time.monotonic() < deadline:
            time.sleep(0.01)

    def _send(self, number: signal.Signals) -> bool:
        if not self.alive:
            return False
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    @property
    def alive(self) -> bool:
        """Whether the process still exists; another process under its number is not it."""
        return RunProcess.find(self.pid) == self


def _begin(process: psutil.Process) -> str:
    boot = PROC / "sys" / "kernel" / "random" / "boot_id"
    if not boot.exists():
        return str(process.create_time())
    stat = (PROC / str(process.pid) / "stat").read_text(errors="replace")  # another program may have the number now
    return f"{boot.read_text().strip()} {stat.rpartition(')')[2].split()[19]}"  # field 22 of proc_pid_stat(5)


@dataclass(frozen=True)
class ForkedProcess:
    """A run's process that waits; if its connection is closed before `begin`, it ends without having done anything."""

    connection: socket.socket
    process: RunProcess

    def begin(self) -> None:
        """Let it execute the run. If it has ended by now, the fork server or Dagster's run monitoring reports that."""
        with suppress(ConnectionError):
            self.connection.sendall(fork_server.BEGIN)


class ForkServers:
    """The fork servers that this process has started.

    A server has the variables, the working directory and the process group that this process has when it starts one.
    Its runs get these, and with the group also the terminal's Ctrl-C. So another server is started if they change.
    """

    def __init__(self, folder: Path) -> None:
        """`folder`: of their log."""
        self._folder = folder
        self._lock = threading.Lock()  # threads that launch runs at once share a server
        self._controls: dict[object, socket.socket] = {}  # to each server; without it, one ends with its last run
        self._unfit: dict[object, tuple[float, str]] = {}
        weakref.finalize(self, lambda controls: [*map(socket.socket.close, controls.values())], self._controls)

    def fork(self, executable: str, run_id: str, arguments: str) -> ForkedProcess:
        """Return a new process that waits to execute a run.

        `executable`: the Python of the code location. `arguments`: for `dagster api execute_run`.
        Raises ForkServerUnavailableError: no server could be started, or none has answered.
        """
        request = json.dumps({"run_id": run_id, "arguments": arguments}).encode() + b"\n"
        cause: object = "it ended before it answered"
        for _ in range(ATTEMPTS):
            try:
                with ExitStack() as closed:
                    connection, theirs = map(closed.enter_context, socket.socketpair())
                    self._send(executable, theirs)
                    theirs.close()
                    connection.settimeout(ANSWER_SECONDS)
                    connection.sendall(request)
                    if process := self._read_process(executable, connection):
                        closed.pop_all()
                        return ForkedProcess(connection, process)
            except ConnectionError:
                continue
            except (OSError, ValueError) as error:
                late = f"it has not answered within {ANSWER_SECONDS:.0f} s"
                cause = late if isinstance(error, TimeoutError) else error
                break
        log = self._folder / fork_server.LOG
        raise ForkServerUnavailableError(f"The fork server cannot start a run: {cause}. Its log is {log}.")

    def _read_process(self, executable: str, connection: socket.socket) -> RunProcess | None:
        """Return the process that a server has forked; None if it has ended. Remember a server that cannot fork."""
        answer = fork_server.read_line(connection).strip()
        if not answer.isdigit():
            self._unfit[_key(executable)] = time.monotonic() + UNFIT_SECONDS, answer
            raise OSError(answer)
        return RunProcess.find(int(answer))

    def _send(self, executable: str, connection: socket.socket) -> None:
        """Send a server the other end of a connection; start the server if there is none, or if it has ended.

        Raises OSError: there is no such Python, the folder cannot be made, or the last server could not fork.
        """
        key = _key(executable)
        until, why = self._unfit.get(key, (0.0, ""))
        if time.monotonic() < until:
            raise OSError(why)
        with self._lock:
            try:
                socket.send_fds(self._controls[key], [b"."], [connection.fileno()])
            except (KeyError, ConnectionError):
                self._start(key, executable)
                socket.send_fds(self._controls[key], [b"."], [connection.fileno()])

    def _start(self, key: object, executable: str) -> None:
        """Start a server, in place of one that has ended. What it is sent waits until it has imported Dagster."""
        self._folder.mkdir(parents=True, exist_ok=True)
        control, theirs = socket.socketpair()
        control.settimeout(ANSWER_SECONDS)
        with theirs, self._controls.get(key, theirs):
            self._controls[key] = control
            number = theirs.fileno()
            command = [executable, fork_server.__file__, str(number), str(self._folder)]
            server = subprocess.Popen(command, pass_fds=[number], env=dict(os.environ), stdin=subprocess.DEVNULL)
        threading.Thread(target=server.wait, daemon=True).start()  # reaps the server, which may outlive this process


def _key(executable: str) -> object:
    """Return what the runs of one server have in common."""
    return executable, Path.cwd(), os.getpgrp(), tuple(sorted(os.environ.items()))
