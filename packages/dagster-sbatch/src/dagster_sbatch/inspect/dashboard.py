"""The Ray dashboard of a running job, on a port of this machine.

It listens on the loopback interface of the job's first node alone. The way there is one step of the job (`srun`),
started through the login node, that passes connections on: it needs no port and no SSH between the nodes.
"""

import json
import shlex
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dagster_sbatch.auth import ensure_certificate
from dagster_sbatch.children import child_environment
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.inspect.runs import RunRecord, Runs
from dagster_sbatch.launchers.ray.relay import Relay, await_far_end
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import Site
from dagster_sbatch.slurm.gateway import RefusedError
from dagster_sbatch.slurm.gateway.agent.slurm import KEPT
from dagster_sbatch.slurm.gateway.shell import after_login_profile, for_any_shell
from dagster_sbatch.ssh import connect

STATE = "ray/state"
"""In a run directory: what its Ray cluster tells of itself."""


@dataclass(frozen=True)
class Dashboard:
    """A way to a dashboard that is open.

    Attributes:
        address: to be opened in a browser on this machine.
        token: what the dashboard asks for; it is good for all that the cluster's owner may do.
        ended: is set when the way is closed from the other side: the job is over, or the connection lost.
    """

    address: str
    token: str
    ended: threading.Event


@contextmanager
def open_dashboard(settings: Settings, site: Site, runs: Runs, run: RunRecord) -> Iterator[Dashboard]:
    """Open a way to the dashboard of a run's Ray cluster; it closes when the context ends.

    Raises:
        ConfigurationError: the run has no Ray cluster, or not yet, or not any more.
        AccessError, SshError: there is no access; see there.
    """
    head = _fetch(runs, run, "head.json")
    if not head:
        raise ConfigurationError(f"the Ray cluster of {run.key} has not started yet: try again in some seconds")
    told = json.loads(head)
    relay = [told["python"], f"{run.path}/ray/relay.py", str(told["dashboard_port"])]
    command = [
        "srun",
        f"--jobid={run.job}",
        "--overlap",
        "--unbuffered",
        "--nodes=1",
        "--ntasks=1",
        f"--nodelist={told['hostname']}",
    ]
    with ExitStack() as stack:
        read, write = stack.enter_context(_start(settings, site, [*command, *relay]))
        if not await_far_end(read):
            raise ConfigurationError(f"no step could be started in job {run.job}: is it still running?")
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        ended = threading.Event()
        _serve(Relay(read, write), listener, ended)
        yield Dashboard(f"http://127.0.0.1:{listener.getsockname()[1]}", _fetch(runs, run, "token").strip(), ended)


def _fetch(runs: Runs, run: RunRecord, name: str) -> str:
    with TemporaryDirectory() as folder:
        path = Path(folder, name)
        try:
            runs.gateway.get(f"{run.path}/{STATE}/{name}", path)
        except RefusedError as error:
            raise ConfigurationError(f"{run.key} has no Ray cluster, or not yet ({error})") from None
        return path.read_text()


@contextmanager
def _start(
    settings: Settings, site: Site, command: list[str]
) -> Iterator[tuple[Callable[[int], bytes], Callable[[bytes], Any]]]:
    """A command on the login node: how to read from it, and to write to it."""
    if settings.on_login_node:
        pipe = subprocess.PIPE
        with subprocess.Popen(command, env=child_environment(*KEPT), stdin=pipe, stdout=pipe, bufsize=0) as process:
            assert process.stdin
            assert process.stdout
            yield process.stdout.read, process.stdin.write
            process.terminate()
        return
    with connect(settings, ensure_certificate, site.host_authorities) as connection:
        channel = connection.transport.open_session()
        script = after_login_profile(site.setup_commands, f"exec {shlex.join(command)}")
        channel.exec_command(for_any_shell(script))
        yield channel.recv, channel.sendall
        channel.close()


def _serve(relay: Relay, listener: socket.socket, ended: threading.Event) -> None:
    """Pass connections on in the background, until the listener is closed or the other end is gone."""

    def accept() -> None:
        with suppress(OSError):
            while True:
                relay.add(listener.accept()[0])

    def run() -> None:
        with suppress(OSError, EOFError):
            relay.run()
        ended.set()
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)

    for target in (accept, run):
        threading.Thread(target=target, name=f"dashboard {target.__name__}", daemon=True).start()
