"""Reserve and check ports for the processes of Ray on this node."""

import os
import re
import secrets
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from job_cluster import NodeError

PORTS = range(20000, 32768)  # below the ports that Linux uses for outgoing connections (ip_local_port_range)
_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_LISTENING = "0A"


def claim_ports(count: int) -> tuple[list[int], list[socket.socket]]:
    """Reserve free ports for processes that are about to start; begin at a random port.

    A socket that is bound and does not listen keeps its port from every process that binds without SO_REUSEADDR, as
    this function does. Ray's processes bind with it, so they get the port.
    Returns the ports, and the sockets that reserve them: keep these open as long as the ports are used.
    Raises NodeError: there are fewer free ports.
    """
    ports: list[int] = []
    claims: list[socket.socket] = []
    first = secrets.randbelow(len(PORTS))
    for step in range(len(PORTS)):
        port = PORTS[(first + step) % len(PORTS)]
        claim = socket.socket()
        try:
            claim.bind(("", port))
        except OSError:
            claim.close()
            continue
        claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ports.append(port)
        claims.append(claim)
        if len(ports) == count:
            return ports, claims
    raise NodeError(f"no {count} free ports from {PORTS.start} to {PORTS.stop - 1}")


def is_ours(port: int) -> bool:
    """Return whether a process of this user listens on a TCP port of this node, and nobody else does."""
    owners = set()
    for table in _TABLES:
        with suppress(FileNotFoundError):  # no IPv6 here
            for line in table.read_text().splitlines()[1:]:
                _, local, _, connection, *_, owner = line.split()[:8]
                if connection == _LISTENING and int(local.rpartition(":")[2], 16) == port:
                    owners.add(int(owner))
    return owners == {os.getuid()}


def check_ports(arguments: Iterable[str]) -> None:
    """Check that the ports which the user has chosen are free: Ray reports a taken port only deep in its logs.

    Raises NodeError: one is taken.
    """
    for argument in arguments:
        chosen = re.fullmatch(r"--(?!m(?:in|ax)-worker-)[a-z-]+-port=([1-9][0-9]*)", argument)
        if chosen:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Ray does: a port in TIME_WAIT is free
                try:
                    probe.bind(("", int(chosen[1])))
                except OSError as error:
                    raise NodeError(f"cannot use the port of {argument}: {error.strerror}") from None
