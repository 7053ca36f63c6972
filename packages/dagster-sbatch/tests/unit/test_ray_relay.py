"""Many connections over one pair of pipes."""

import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dagster_sbatch.launchers.ray import relay
from dagster_sbatch.launchers.ray.relay import HELLO, Relay, await_far_end
from slurm_in_a_box import wait_until


@contextmanager
def relayed(port: int) -> Iterator[Relay]:
    """A near end whose far end connects to a port of this machine."""
    here, there = socket.socketpair()
    near = Relay(here.recv, here.sendall)
    far = Relay(there.recv, there.sendall, lambda: socket.create_connection(("127.0.0.1", port)))
    threads = [threading.Thread(target=end.run) for end in (near, far)]
    for thread in threads:
        thread.start()
    try:
        yield near
    finally:
        for end in (here, there):
            end.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(10)
        here.close()
        there.close()


def echo(server: socket.socket) -> None:
    """Send back what comes, for each connection, until it is closed."""
    while True:
        try:
            connection = server.accept()[0]
        except OSError:
            return

        def answer(connection: socket.socket = connection) -> None:
            with connection:
                while data := connection.recv(1000):
                    connection.sendall(data)

        threading.Thread(target=answer, daemon=True).start()


def test_each_connection_gets_its_own_bytes_back() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=echo, args=(server,), daemon=True).start()
        with relayed(server.getsockname()[1]) as near:
            users = []
            for _ in range(10):
                user, end = socket.socketpair()
                near.add(end)
                users.append((user, secrets.token_bytes(300_000)))
            for user, data in users:
                threading.Thread(target=user.sendall, args=(data,)).start()
            for user, data in users:
                received = b""
                while len(received) < len(data):
                    received += user.recv(1 << 16)
                assert received == data
                user.close()
        server.shutdown(socket.SHUT_RDWR)


def test_a_connection_that_is_refused_at_the_far_end_is_closed_at_the_near_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with relayed(port) as near:
        user, end = socket.socketpair()
        near.add(end)
        user.sendall(b"hello")
        user.settimeout(10)
        assert user.recv(10) == b""
        user.close()


def test_a_connection_that_takes_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what the dashboard sends to a browser that stalls would fill the memory."""
    monkeypatch.setattr(relay, "MOST_WAITING", 10)
    with socket.create_server(("127.0.0.1", 0)) as server, relayed(server.getsockname()[1]) as near:
        user, end = socket.socketpair()
        near.add(end)
        user.sendall(b"send me much")
        dashboard = server.accept()[0]
        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            while True:
                dashboard.sendall(bytes(relay.PIECE))
        dashboard.close()
        user.close()


def test_when_the_other_end_is_gone_connections_end() -> None:
    here, there = socket.socketpair()
    near = Relay(here.recv, here.sendall)
    thread = threading.Thread(target=near.run)
    thread.start()
    user, end = socket.socketpair()
    near.add(end)
    there.close()
    user.settimeout(10)
    assert user.recv(10) == b""
    wait_until(lambda: not thread.is_alive(), "the near end has ended", 10)
    user.close()
    here.close()


def test_what_a_login_shell_prints_before_is_passed_over() -> None:
    text = b"* 1234.5 node hours left *\n\0" + HELLO + b"next"
    source = iter(bytes([byte]) for byte in text)
    assert await_far_end(lambda size: next(source, b""))
    assert b"".join(source) == b"next"
    assert not await_far_end(lambda size: b"")
