"""The way to a dashboard through sshd, as login nodes run it."""

import getpass
import secrets
import socket
import socketserver
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from dagster_sbatch.inspect import dashboard as dashboards
from dagster_sbatch.inspect.dashboard import Dashboard, forward
from dagster_sbatch.settings import Settings
from slurm_in_a_box import wait_until
from unit.ssh_forge import Forge, needs_sshd

pytestmark = needs_sshd
MANY = 100  # connections


def accepts_connections(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class LoginNode:
    """An sshd on a port of its own that takes certificates of its user."""

    def __init__(self, forge: Forge, options: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        forge.certify("ed25519-user", f"-s ed25519-ca -n {getpass.getuser()} -V +1h")
        own = f"Port {port}\nListenAddress 127.0.0.1\nPidFile none\nTrustedUserCAKeys {forge.key('ed25519-ca')}.pub\n"
        command = ["-D" if word == "-i" else word for word in forge.sshd("ed25519", extra=own + options)]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        (forge.folder / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{port} {forge.public('ed25519')}\n")
        login = {"HOST": "127.0.0.1", "PORT": port, "USER": getpass.getuser(), "KEY_PATH": forge.key("ed25519-user")}
        self._settings = Settings.model_validate({f"SLURM_EDGE_NODE_{name}": value for name, value in login.items()})
        wait_until(lambda: accepts_connections(port), "sshd listens", 30)

    @contextmanager
    def dialling(self, port: int) -> Iterator[dashboards.Dial]:
        """The way to a dashboard on that port, as seen from here."""
        site: Any = SimpleNamespace(host_authorities=())
        with dashboards._dialling(self._settings, site, "127.0.0.1", port) as dial:
            yield dial

    def drop_connections(self) -> None:
        for child in psutil.Process(self._process.pid).children(recursive=True):
            child.kill()

    def stop(self) -> None:
        self.drop_connections()
        self._process.kill()
        self._process.wait()


@pytest.fixture
def start(forge: Forge, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], LoginNode]]:
    """`start(options)` gives a login node with these options of sshd_config(5)."""
    made: list[LoginNode] = []
    monkeypatch.setattr(dashboards, "ensure_certificate", lambda _: None)
    monkeypatch.setattr(dashboards, "CHECK_SECONDS", 0)

    def make(options: str) -> LoginNode:
        made.append(LoginNode(forge, options))
        return made[-1]

    yield make
    for each in made:
        each.stop()


@pytest.fixture
def far_end() -> Iterator[int]:
    """The port of a server that sends back what it gets."""

    class Echo(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while data := self.request.recv(1 << 16):
                self.request.sendall(data)

    class Server(socketserver.ThreadingTCPServer):
        request_queue_size = MANY
        daemon_threads = True

    with Server(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def connect_at_once(port: int, number: int) -> list[socket.socket]:
    """Begin connections, each before the one before it is accepted."""
    users = [socket.socket() for _ in range(number)]
    for user in users:
        user.settimeout(0)
        user.connect_ex(("127.0.0.1", port))
        user.settimeout(60)
    return users


def exchange(user: socket.socket, text: bytes) -> bytes:
    """Send a text and its end; return what comes back."""
    came = bytearray()
    with user:
        sender = threading.Thread(target=user.sendall, args=(text,))
        sender.start()
        while len(came) < len(text) and (piece := user.recv(1 << 16)):
            came += piece
        sender.join(60)
        user.shutdown(socket.SHUT_WR)
        came += user.recv(1)
    return bytes(came)


def test_many_connections_at_once_while_keys_are_exchanged_again_and_again(
    start: Callable[[str], LoginNode], far_end: int
) -> None:
    texts = [secrets.token_bytes(100_000) for _ in range(MANY)]
    with (
        start("RekeyLimit 1M\nMaxSessions 1").dialling(far_end) as dial,
        forward(dial) as port,
        ThreadPoolExecutor(MANY) as pool,
    ):
        came = list(pool.map(exchange, connect_at_once(port, MANY), texts))
    assert [index for index, text in enumerate(texts) if came[index] != text] == []


def test_the_forwarding_ends_with_the_connection_to_the_login_node(
    start: Callable[[str], LoginNode], far_end: int
) -> None:
    login_node = start("")
    with login_node.dialling(far_end) as dial, forward(dial) as port:
        with socket.create_connection(("127.0.0.1", port), 60) as user:
            user.sendall(b"hello")
            assert user.recv(5, socket.MSG_WAITALL) == b"hello"
            login_node.drop_connections()
            assert user.recv(10) == b""
        reason = Dashboard("", "", dial).wait_until_gone()
    assert "the connection with the login node is lost (" in reason


def test_a_login_node_that_forbids_forwarding(start: Callable[[str], LoginNode], far_end: int) -> None:
    with start("AllowTcpForwarding no").dialling(far_end) as dial:
        reason = Dashboard("", "", dial).wait_until_gone()
        with forward(dial) as port, socket.create_connection(("127.0.0.1", port), 60) as user:
            assert user.recv(10) == b""
    assert reason == "the dashboard did not answer 3 times in a row (Administratively prohibited)"
