"""Reserve ports for processes that are about to start. Jobs of SrunLauncher and of RayLauncher get this file."""

import secrets
import socket

PORTS = range(20000, 32768)  # below the ports that Linux uses for outgoing connections (ip_local_port_range)


def claim_ports(count: int) -> dict[int, socket.socket]:
    """Reserve free ports of this machine; begin at a random port.

    A socket that is bound and does not listen keeps its port from every process that binds without SO_REUSEADDR, as
    this function does. Ray and PyTorch bind with it, so they get the port.
    Returns the sockets that reserve the ports, by port: keep them open as long as the ports are used.
    Raises OSError: there are fewer free ports.
    """
    claims: dict[int, socket.socket] = {}
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
        claims[port] = claim
        if len(claims) == count:
            return claims
    raise OSError(f"{socket.gethostname()} has fewer than {count} free ports from {PORTS.start} to {PORTS.stop - 1}")
