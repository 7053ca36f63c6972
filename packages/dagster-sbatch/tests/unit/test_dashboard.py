"""The way to a dashboard: a local port that is forwarded, and the reasons why there is none."""

import hashlib
import json
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from paramiko import OPEN_SUCCEEDED, SSHException

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.inspect import dashboard as dashboards
from dagster_sbatch.inspect.dashboard import forward, open_dashboard
from dagster_sbatch.slurm.gateway import RefusedError
from unit.ssh_forge import Forge
from unit.test_ssh_connection import Welcome, as_server, server, settings

RUN: Any = SimpleNamespace(path="/runs/key", key="key", job="7", end=None)
ENDED: Any = SimpleNamespace(**{**vars(RUN), "end": "COMPLETED"})
ON_LOGIN_NODE: Any = SimpleNamespace(on_login_node=True)


@pytest.fixture
def far_end() -> Iterator[socket.socket]:
    """A server that stands for the dashboard."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def dial(server: socket.socket) -> socket.socket:
    return socket.create_connection(server.getsockname())


def read_all(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size and (piece := connection.recv(1 << 16)):
        received += piece
    return received


def test_each_connection_gets_its_own_bytes_back(far_end: socket.socket) -> None:
    """And the end of what one side sends reaches the other."""
    texts = [secrets.token_bytes(300_000) for _ in range(10)]

    def echo(connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(1000):
                connection.sendall(data)

    with forward(lambda: dial(far_end)) as port:
        users = [socket.create_connection(("127.0.0.1", port)) for _ in texts]
        for user, text in zip(users, texts, strict=True):
            threading.Thread(target=echo, args=(far_end.accept()[0],), daemon=True).start()
            threading.Thread(target=user.sendall, args=(text,), daemon=True).start()
        for user, text in zip(users, texts, strict=True):
            assert read_all(user, len(text)) == text
            user.shutdown(socket.SHUT_WR)
            assert user.recv(1) == b""
            user.close()


def test_a_connection_that_is_refused_at_the_far_end_is_closed_at_this_one() -> None:
    def refuse() -> socket.socket:
        raise ConnectionRefusedError

    with forward(refuse) as port, socket.create_connection(("127.0.0.1", port), timeout=10) as user:
        assert user.recv(10) == b""


def test_a_browser_that_stalls_stops_the_dashboard_and_fills_no_memory(far_end: socket.socket) -> None:
    with forward(lambda: dial(far_end)) as port, socket.create_connection(("127.0.0.1", port)):
        connection = far_end.accept()[0]
        connection.settimeout(1)
        with connection, pytest.raises(TimeoutError):
            for _ in range(1000):
                connection.sendall(bytes(1 << 20))


def runs_with(**published: str) -> Any:
    """Runs whose Ray cluster has published these files of its state folder."""

    def exchange(requests: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, str], bytes]]:
        path = Path(requests[0]["path"])
        if path.name not in published:
            raise RefusedError(f"{path}: no such file")
        data = published[path.name].encode()
        yield requests[0], {"file": path.name}, data
        yield requests[0], {"sha256": hashlib.sha256(data).hexdigest()}, b""

    return SimpleNamespace(gateway=SimpleNamespace(exchange=exchange, patiently=lambda step: step()))


def head(address: tuple[str, int] | None) -> str:
    return json.dumps({"dashboard_address": address}) + "\n"


def test_on_the_login_node_the_dashboard_is_reached_without_ssh(far_end: socket.socket) -> None:
    runs = runs_with(**{"head.json": head(far_end.getsockname()), "token": "secret\n"})
    with open_dashboard(ON_LOGIN_NODE, None, runs, RUN) as dashboard:  # type: ignore[arg-type]
        assert dashboard.token == "secret"
        far_end.accept()[0].close()  # whether it can be reached
        port = int(dashboard.url.removeprefix("http://127.0.0.1:"))
        with socket.create_connection(("127.0.0.1", port)) as user, far_end.accept()[0] as there:
            user.sendall(b"hello")
            assert there.recv(10) == b"hello"
        with dashboard.dial() as quiet:
            assert quiet.gettimeout() is None, "a page may be silent for longer than a connection takes"
        far_end.close()
        assert "did not answer 3 times in a row (" in dashboard.wait_until_gone()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboards, "CHECK_SECONDS", 0)


def test_the_forwarding_ends_after_three_failed_checks_in_a_row() -> None:
    failures = [TimeoutError("timed out"), EOFError(), None, EOFError(), SSHException("busy"), EOFError(), None]
    checks = iter(failures)

    def check() -> Any:
        if error := next(checks):
            raise error
        return SimpleNamespace(close=lambda: None)

    reason = dashboards.Dashboard("", "", check).wait_until_gone()
    assert reason == "the dashboard did not answer 3 times in a row (the connection was closed)"
    assert list(checks) == [None]


class LoginNode(Welcome):
    """Lets everybody in, and accepts every connection further on."""

    def check_channel_direct_tcpip_request(self, *_: object) -> int:
        return int(OPEN_SUCCEEDED)


@contextmanager
def through_login_node(forge: Forge, monkeypatch: pytest.MonkeyPatch) -> Iterator[dashboards.Dial]:
    """The way to a dashboard through a login node."""
    monkeypatch.setattr(dashboards, "ensure_certificate", lambda _: None)
    site: Any = SimpleNamespace(host_authorities=())
    with server(as_server(forge, LoginNode())) as port:
        (forge.folder / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{port} {forge.public('ed25519')}\n")
        with dashboards._dialling(settings(forge, port), site, "n1", 8265) as dial_dashboard:
            yield dial_dashboard


def test_a_connection_that_is_lost_within_a_key_exchange_shows_no_traceback(
    forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides make new keys after each 512 MB."""
    with through_login_node(forge, monkeypatch) as dial_dashboard, dial_dashboard() as far:
        transport, (near, browser) = far.get_transport(), socket.socketpair()
        transport.clear_to_send_timeout = 0.1
        transport.clear_to_send.clear()  # as from the beginning of an exchange to its end
        with near, browser:
            browser.sendall(b"hello")
            dashboards._copy(near, far)
        transport.clear_to_send.set()


@pytest.mark.parametrize("saved", [ConnectionResetError("reset"), EOFError(), None])
def test_a_connection_that_is_lost_while_a_page_is_opened(
    saved: Exception | None, forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paramiko raises what has ended the connection, of whatever kind."""
    with through_login_node(forge, monkeypatch) as dial_dashboard:
        client = dial_dashboard().get_transport()
        monkeypatch.setattr(client, "_send_user_message", lambda _: client.close())
        monkeypatch.setattr(client, "get_exception", lambda: saved)
        with pytest.raises(dashboards.LostError, match="the connection with the login node is lost"):
            dial_dashboard()


@pytest.mark.parametrize(
    ("run", "published", "text"),
    [
        (RUN, {}, "key has no Ray cluster, or it has not started yet"),
        (RUN, {"head.json": ""}, "has not started yet. Try again"),
        (RUN, {"head.json": head(None)[:9]}, "has not started yet. Try again"),  # it is being written
        (RUN, {"head.json": head(None)}, "has no dashboard"),
        (RUN, {"head.json": head(("127.0.0.1", 1))}, "cannot connect to the Ray dashboard of job 7: .*refused"),
        (ENDED, {"head.json": head(("127.0.0.1", 1))}, "Job 7 has ended"),
    ],
)
def test_why_there_is_no_way_to_a_dashboard(run: Any, published: dict[str, str], text: str) -> None:
    opening = open_dashboard(ON_LOGIN_NODE, None, runs_with(**published), run)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=text), opening:
        pass
