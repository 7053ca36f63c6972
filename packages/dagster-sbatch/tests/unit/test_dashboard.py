"""Forwarding a local port to a dashboard."""

import secrets
import socket
import threading
from collections.abc import Iterator

import pytest

from dagster_sbatch.inspect.dashboard import forward


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
