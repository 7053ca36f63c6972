"""Forward a local port to the Ray dashboard of a running job.

The dashboard listens on the address of the job's first node and asks for the token of the cluster. Connections go
through the login node (SSH's direct-tcpip), which therefore must be able to reach the compute nodes.
"""

import json
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from paramiko import Channel, SSHException, Transport

from dagster_sbatch.auth import ensure_certificate
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.inspect.remote_runs import RunRecord, Runs
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import Site
from dagster_sbatch.slurm.gateway import RefusedError, fetch_file
from dagster_sbatch.ssh import connect
from dagster_sbatch.ssh.connection import text_of

STATE = "ray/state"  # in a run directory: what the job's Ray cluster publishes
DIAL_SECONDS = 10
CHECK_SECONDS = 5
PIECE = 1 << 15

MOST_FAILURES = 3  # after this many failed checks in a row, the dashboard is gone; one alone may be a busy node

Dial = Callable[[], Any]
"""Opens a connection to the dashboard: a socket, or a channel of SSH, which has the same methods."""


class LostError(OSError):
    """The connection with the login node has ended."""


_LOST = (OSError, EOFError, SSHException)  # of a connection of either kind, at any time


@dataclass(frozen=True)
class Dashboard:
    """An open way to a dashboard."""

    url: str  # for a browser on this machine
    token: str  # login token of the dashboard. Whoever has it can run code on the cluster: do not share it
    dial: Dial

    def wait_until_gone(self) -> str:
        """Return why the dashboard cannot be reached any more, as soon as that is so."""
        failures = 0
        while True:
            try:
                self.dial().close()
                failures = 0
            except LostError as error:
                return str(error)
            except _LOST as error:
                failures += 1
                if failures == MOST_FAILURES:
                    return f"the dashboard did not answer {failures} times in a row ({text_of(error)})"
            time.sleep(CHECK_SECONDS)


@contextmanager
def open_dashboard(settings: Settings, site: Site, runs: Runs, run: RunRecord) -> Iterator[Dashboard]:
    """Open a way to the dashboard of a run's Ray cluster; it closes when the context ends.

    Raises ConfigurationError: the run has no Ray dashboard, or it cannot be reached.
    Raises AccessError, SshError: there is no access; see there.
    """
    if run.end:
        raise ConfigurationError(f"Job {run.job} has ended, and its Ray cluster with it.")
    text = _fetch(runs, run, "head.json")
    if not text.endswith("\n"):  # empty, or half of it is written
        raise ConfigurationError(f"The Ray cluster of {run.key} has not started yet. Try again in some seconds.")
    address = json.loads(text)["dashboard_address"]
    if not address:
        raise ConfigurationError(f"The Ray cluster of {run.key} has no dashboard: it was started without one.")
    host, port = address
    with _dialling(settings, site, host, port) as dial, forward(dial) as local_port:
        try:
            dial().close()
        except _LOST as error:
            raise ConfigurationError(
                f"The login node cannot connect to the Ray dashboard of job {run.job}: {text_of(error)}. Either the "
                "job has ended, or the site forbids such connections. To see the state of the job:\n"
                f"  scripts/job {run.job} state"
            ) from None
        yield Dashboard(f"http://127.0.0.1:{local_port}", _fetch(runs, run, "token").strip(), dial)


@contextmanager
def _dialling(settings: Settings, site: Site, host: str, port: int) -> Iterator[Dial]:
    """Yield what connects to a port of a compute node from the login node."""
    if settings.on_login_node:
        yield lambda: _dial_directly(host, port)
        return
    with connect(settings, ensure_certificate, site.host_authorities) as connection:
        yield lambda: _dial_through(connection.transport, host, port)


def _dial_directly(host: str, port: int) -> socket.socket:
    connection = socket.create_connection((host, port), DIAL_SECONDS)
    connection.settimeout(None)  # a page may be silent for longer than a connection takes
    return connection


def _dial_through(transport: Transport, host: str, port: int) -> Channel:
    try:
        return transport.open_channel("direct-tcpip", (host, port), ("127.0.0.1", 0), timeout=DIAL_SECONDS)
    except _LOST as error:
        if transport.is_active():
            raise
        raise LostError(f"the connection with the login node is lost ({text_of(error)})") from error


def _fetch(runs: Runs, run: RunRecord, name: str) -> str:
    with TemporaryDirectory() as folder:
        path = Path(folder, name)
        try:
            fetch_file(runs.gateway, f"{run.path}/{STATE}/{name}", path)
        except RefusedError as error:
            raise ConfigurationError(f"{run.key} has no Ray cluster, or it has not started yet ({error})") from None
        return path.read_text()


@contextmanager
def forward(dial: Dial) -> Iterator[int]:
    """Connect each connection to a port of this machine with a new one from `dial`; yield the port."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(*_LOST), dial() as far:
                threading.Thread(target=_copy, args=(self.request, far), daemon=True).start()
                _copy(far, self.request)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 128  # of connections that come at once; the system resets those beyond it

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


def _copy(source: Any, target: Any) -> None:
    with suppress(*_LOST):
        while data := source.recv(PIECE):
            target.sendall(data)
    with suppress(*_LOST):
        target.shutdown(socket.SHUT_WR)
