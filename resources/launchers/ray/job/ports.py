"""Ports for the processes of Ray on this node."""

import re
import socket
from collections.abc import Iterable

from job_cluster import NodeError

PORTS = range(20000, 32768)
"""Below those that Linux gives to outgoing connections (ip_local_port_range)."""


def claim_ports(count: int, first: int) -> tuple[list[int], list[socket.socket]]:
    """Free ports, and what keeps the launchers of other jobs on this node from them.

    Args:
        count: how many.
        first: where to begin to look; another number for each job.

    Returns:
        The ports, and sockets (in the abstract namespace, one a port) to be held as long as they are used.
    """
    ports: list[int] = []
    claims: list[socket.socket] = []
    for step in range(len(PORTS)):
        port = PORTS[(first + step) % len(PORTS)]
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            claim.bind(f"\0ray-job-port-{port}")
            with socket.socket() as probe:
                probe.bind(("", port))
        except OSError:
            claim.close()
            continue
        ports.append(port)
        claims.append(claim)
        if len(ports) == count:
            return ports, claims
    raise NodeError(f"no {count} free ports from {PORTS.start} to {PORTS.stop - 1}")


def check_ports(arguments: Iterable[str]) -> None:
    """See that the ports which somebody has chosen can be had: Ray says so only in the middle of its logs.

    Args:
        arguments: of `ray start`.

    Raises:
        NodeError: one is taken.
    """
    for argument in arguments:
        chosen = re.fullmatch(r"--(?!m(?:in|ax)-worker-)[a-z-]+-port=([1-9][0-9]*)", argument)
        if chosen:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Ray does: not what a late packet holds
                try:
                    probe.bind(("", int(chosen[1])))
                except OSError as error:
                    raise NodeError(f"the port of {argument} cannot be had: {error.strerror}") from None
