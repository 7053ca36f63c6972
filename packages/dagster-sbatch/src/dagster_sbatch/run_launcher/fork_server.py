"""The fork server: a process that has imported Dagster, and forks a process for each run.

`dagster_sbatch.run_launcher.fork_client` starts this file as a script, in the Python of the code location. That Python
has Dagster, and need not have this package: so all of the server is in this file.

The server imports only what each run needs whatever its code is: Dagster, and this package with its libraries. It never
imports the project: each run does that itself, as with Dagster's default launcher. So a run has the project's code and
settings as they are when it starts; and threads, random numbers and connections that a library makes at its import
belong to one run. When a file that the server has imported changes, it retires, and the next run gets a new server.

It has one thread and no open database when it forks: a child would have neither the other threads nor their locks.

    fork_server.py CONTROL FOLDER

CONTROL is the number of a socket, over which the Dagster process that has started the server sends it a connection for
each run, and which ends with that process. FOLDER is that of the log. A request is a line of JSON. The answer is a line
from the new process: its pid; or from a server that can never fork: the reason. The process executes the run when the
client says BEGIN, and ends if the client closes the connection instead.
"""

import contextlib
import gc
import importlib
import importlib.metadata
import json
import os
import select
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOG = "fork-server.log"
LOG_BYTES = 1_000_000  # size at which the log becomes `fork-server.log.old`
BEGIN = b"begin\n"
PROCESS_TAG = "dagster_sbatch/run_process"
"""Tag of a run with its id and what identifies its process. A retry has the tag of its predecessor until it starts."""
REQUEST_SECONDS = 10.0
IDLE_SECONDS = 600.0  # after which a server without runs ends. The next run starts another one
LOOK_SECONDS = 5.0
REHEARSAL = "dagster_sbatch_rehearsal"
ASSET = """\
import dagster as dg

@dg.asset
def nothing() -> None: ...

defs = dg.Definitions(assets=[nothing], executor=dg.in_process_executor)
"""
LIBRARIES = tuple(
    "dagster_sbatch.run.compute dagster_sbatch.run.remote_job dagster_sbatch.ssh.connection fabric httpx httpcore "
    "certifi encodings.idna".split()
)
"""What runs of this package import, some of it only once a step has begun."""


def read_line(connection: socket.socket) -> str:
    """Return the next line of a connection as text.

    Raises ConnectionError: the other side has closed it.
    """
    with connection.makefile(encoding="utf-8") as file:
        line = file.readline()
    if not line.endswith("\n"):
        raise ConnectionError("the connection was closed")
    return line


class Server:
    """A fork server."""

    execute: Callable[[], None]  # the console command `dagster`, once `warm_up` has imported it

    def __init__(self, control: socket.socket, folder: Path) -> None:
        self.runs: dict[int, dict[str, str]] = {}  # the id of the run and its arguments, by the pid of its process
        self._control: socket.socket | None = control
        self._log_file = folder / LOG
        self._versions: list[tuple[bytes, object]] = []
        self._stopping, self._idle_since = False, time.monotonic()
        self._streams = os.dup(1), os.dup(2)
        self._open_log()
        self._wake_read, self._wake_write = os.pipe()
        for end in (self._wake_read, self._wake_write):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def warm_up(self, request: "dict[str, str]") -> None:
        """Do once what every run has to do, with the first request; remember the files that this depends on."""
        gc.disable()  # fewer holes in the memory that the runs share
        begin = time.monotonic()
        self.execute = _console_command()
        for name in LIBRARIES:
            with contextlib.suppress(Exception):  # an optional module, or this package is not installed here
                importlib.import_module(name)
        try:
            _rehearse(self.execute)
            _parse(request)
        except Exception as error:  # noqa: BLE001 - then each run does more itself
            self.log(f"the rehearsal failed: {error!r}")
        files = {module.__file__ for module in list(sys.modules.values()) if getattr(module, "__file__", None)}
        # New objects, side by side: what the server touches between two forks is copied once per run.
        self._versions = [(name, _version(name)) for name in map(os.fsencode, filter(None, files))]
        gc.collect()
        gc.freeze()
        self.log(f"ready after {time.monotonic() - begin:.1f} s with {len(self._versions)} files")

    def serve(self) -> "dict[str, str] | None":
        """Fork until this server retires and all its runs have ended; in a new process, return its request."""
        while not self._over():
            watched: list[Any] = [self._wake_read, *([self._control] if self._control else [])]
            ready, _, _ = select.select(watched, [], [], LOOK_SECONDS)
            if self._wake_read in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
            self._reap()
            if self._stopping:
                self._retire("it was asked to end")
            elif self._control and self._control in ready:
                request = self._fork(self._control)
                if request:
                    return request
        self.log("ended")
        return None

    def log(self, text: str) -> None:
        """Append a line to the log."""
        with contextlib.suppress(OSError):  # the folder is gone, or the disk is full
            if not self._log_file.exists() or not os.path.samestat(self._log_file.stat(), os.fstat(1)):
                self._open_log()  # another server has renamed it
            if os.fstat(1).st_size > LOG_BYTES:
                self._log_file.replace(self._log_file.with_suffix(".log.old"))
                self._open_log()
            os.write(1, f"{time.strftime('%Y-%m-%d %H:%M:%S')} fork server {os.getpid()}: {text}\n".encode())

    def _open_log(self) -> None:
        descriptor = os.open(self._log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _over(self) -> bool:
        """Return whether there is nothing left to do."""
        if self.runs:
            self._idle_since = time.monotonic()
        elif self._control and time.monotonic() - self._idle_since > IDLE_SECONDS:
            self._retire(f"no run for {IDLE_SECONDS:.0f} s")
        return not (self.runs or self._control)

    def _retire(self, why: str) -> None:
        """Accept no more requests: clients whose request is not answered yet start another server."""
        if self._control:
            self._control.close()
            self._control = None
            self.log(f"retires: {why}; runs left: {len(self.runs)}")

    def _fork(self, control: socket.socket) -> "dict[str, str] | None":
        """Answer a client by a new process; return the request there, None in the server."""
        descriptors = socket.recv_fds(control, 1, 1)[1]
        if not descriptors:
            self._retire("the process that has started it is gone")
            return None
        connection = socket.socket(fileno=descriptors[0])
        try:
            connection.settimeout(REQUEST_SECONDS)
            request: dict[str, str] = json.loads(read_line(connection))
            fresh = not self._versions
            if fresh:
                self.warm_up(request)
            why = self._unfit()
            if why:
                if fresh:  # another server would be no better
                    connection.sendall(f"{why}\n".encode())
                self._retire(why)
                return None
            pid = os.fork()
            if pid == 0:
                self._become_run(connection, control)
                return request
            self.runs[pid] = request
            self.log(f"run {request['run_id']} has process {pid}")
        except (OSError, ValueError) as error:
            self.log(f"a request failed: {error}")
        finally:
            connection.close()
        return None

    def _become_run(self, connection: socket.socket, control: socket.socket) -> None:
        """In the new process: be like one that Dagster has started, and wait for the client. It may end here."""
        try:
            _reset_signals()
            for number, stream in enumerate(self._streams, 1):
                os.dup2(stream, number)
                os.close(stream)
            for descriptor in (control.detach(), self._wake_read, self._wake_write):
                os.close(descriptor)
            gc.enable()
            connection.sendall(b"%d\n" % os.getpid())
            connection.settimeout(None)
            read_line(connection)
        except BaseException:  # noqa: BLE001 - no code of the server may run in this process after this
            os._exit(1)

    def _unfit(self) -> str:
        """Return why this server must not fork; empty if it may."""
        threads = len(list(Path("/proc/self/task").iterdir()))
        if threads > 1:
            return f"it has {threads} threads"
        changed = next((name for name, seen in self._versions if _version(name) != seen), None)
        return f"{os.fsdecode(changed)} has changed" if changed else ""

    def _reap(self) -> None:
        """Note which runs have ended; a run whose process has crashed is reported to Dagster."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            request = self.runs.pop(pid, None)
            if request:
                code = os.waitstatus_to_exitcode(status)
                self.log(f"run {request['run_id']}: process {pid} has ended with exit code {code}")
                if code != 0 and os.fork() == 0:
                    self._become_reporter(request, pid, code)

    def _become_reporter(self, request: "dict[str, str]", pid: int, code: int) -> None:
        """In a new process: report a crash, and end. Without the control: a client would wait for this process."""
        try:
            _reset_signals()
            if self._control:
                self._control.close()
            self.log(f"run {request['run_id']}: {_report_crash(request, pid, code)}")
        except BaseException as error:  # noqa: BLE001 - no code of the server may run in this process after this
            self.log(f"run {request['run_id']}: the end of process {pid} cannot be reported: {error!r}")
        finally:
            os._exit(0)


def _rehearse(execute: Callable[[], None]) -> None:
    """Materialise a trivial asset by the console command `dagster`, with its history in a temporary folder.

    So the server has the modules, the generated classes and the caches that every run needs. All that this changes for
    the process is undone, and everything that it opens is closed.
    """
    environment, arguments, path = dict(os.environ), sys.argv, list(sys.path)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{REHEARSAL}.py"
        file.write_text(ASSET)
        (Path(folder) / "dagster.yaml").write_text("telemetry: {enabled: false}")
        os.environ["DAGSTER_HOME"] = folder
        sys.argv = ["dagster", "asset", "materialize", "--select", "*", "-f", str(file)]
        try:
            with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
                execute()
        except SystemExit as ended:
            if ended.code:
                raise RuntimeError(f"dagster ended with {ended.code}") from None
        finally:
            os.environ.clear()
            os.environ.update(environment)
            sys.argv, sys.path[:] = arguments, path
            sys.modules.pop(REHEARSAL, None)


def _parse(request: "dict[str, str]") -> Any:
    """Return the arguments of a request, as Dagster's ExecuteRunArgs."""
    from dagster._grpc.types import ExecuteRunArgs
    from dagster._serdes import deserialize_value

    return deserialize_value(request["arguments"], ExecuteRunArgs)


def _report_crash(request: "dict[str, str]", pid: int, code: int) -> str:
    """Report the end of a run whose process has crashed, unless the run has reported it; return what was done.

    A process that the run's tag does not name never began: its client gave up, and another process may have the run.
    """
    import dagster as dg

    arguments = _parse(request)
    with dg.DagsterInstance.from_ref(arguments.instance_ref) as instance:
        run = instance.get_run_by_id(arguments.run_id)
        if run is None or run.is_finished:
            return "its end is reported"
        if not run.tags.get(PROCESS_TAG, "").startswith(f"{run.run_id} {pid} "):
            return f"process {pid} never began it"
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        text = f"The process of this run has ended unexpectedly {how}."
        # The run's status may be STARTED again: a process that starts sets it, whatever it was.
        if instance.get_records_for_run(run.run_id, of_type=dg.DagsterEventType.RUN_CANCELING, limit=1).records:
            instance.report_run_canceled(run, text)
            return "reported as canceled"
        instance.report_run_failed(run, text)
        return "reported as failed"


def _reset_signals() -> None:
    """Handle signals in a new process as Python does at its start."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _console_command() -> "Callable[[], None]":
    """Return the function behind the console command `dagster`, whose `api execute_run` executes a run.

    Dagster's Docker and Kubernetes launchers start that command. Its entry point is the way to it that is public.
    """
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="dagster")
    function: Callable[[], None] = command.load()
    return function


def _version(file: bytes) -> "tuple[int, int, int] | None":
    """Return what changes when a file is written or replaced; None if it is gone."""
    try:
        about = os.stat(file)  # noqa: PTH116 - a Path would take more memory
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size, about.st_ino


def main() -> None:
    """Serve; in the process of a run, execute it and exit as the command `dagster` does."""
    sys.path[0] = str(Path.cwd())  # as `python -m dagster` has it, in place of this file's folder
    server = Server(socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2]))
    request = server.serve()
    if request:
        sys.argv = ["dagster", "api", "execute_run", request["arguments"]]
        server.execute()


if __name__ == "__main__":
    main()
