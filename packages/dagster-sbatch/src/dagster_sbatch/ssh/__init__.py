"""SSH to a login node: a user certificate, strictly checked host keys and host certificates, at most one jump host.

See docs/ssh.md.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dagster_sbatch.settings import Settings

if TYPE_CHECKING:
    import fabric


class SshError(Exception):
    """There is no connection. The text is meant for the user; it holds no secret."""


class HostKeyError(SshError):
    """The machine that answers is not trusted. A retry does not help."""


class AuthenticationError(SshError):
    """The private key cannot be used, or the server does not accept it or its certificate."""


class UnreachableError(SshError):
    """No answer, or the connection was lost. A retry may help."""


def connect(
    settings: Settings, refresh: Callable[[Settings], object], host_authorities: Sequence[str] = ()
) -> "fabric.Connection":
    """Open a connection to the login node; one attempt, or a second one with a new certificate if that is refused.

    For a channel of bytes, use `connection.transport.open_session()`: its window is 2 MB, its stderr is separate from
    its stdout. `connection.open()` reopens a lost connection, and calls `refresh` first, as here.

    Example:
        with connect(settings, ensure_certificate) as connection:
            channel = connection.transport.open_session()
            channel.exec_command("hostname")

    `settings`: SLURM_EDGE_NODE_HOST, _PORT, _USER and _KEY_PATH; ~/.ssh/config fills in those that are not set.
    `refresh`: called with the settings before each attempt, to renew the certificate; its exceptions pass through.
    `host_authorities`: the site's `@cert-authority` lines, for hosts that the user's known_hosts does not have.

    Returns:
        The opened connection, a context manager that closes it and the jump host's.

    Raises ConfigurationError: the settings or ~/.ssh/config name no host or key, or something that is not supported.
    Raises HostKeyError: the machine's host key or host certificate is unknown, changed, revoked or not valid.
    Raises AuthenticationError: the private key or its certificate cannot be used, or was refused.
    Raises UnreachableError: no answer, refused, lost, or too slow; the caller may retry, after a random delay.
    Raises SshError: the two sides have no algorithm in common.
    """
    from dagster_sbatch.auth import replace_refused_certificate
    from dagster_sbatch.ssh.client_config import read_route
    from dagster_sbatch.ssh.connection import Connection

    login, jump = read_route(settings)
    gateway = Connection(jump, None, lambda: None, host_authorities) if jump else None
    used: object = None

    def renew() -> None:
        nonlocal used
        used = refresh(settings)

    connection = Connection(login, gateway, renew, host_authorities)
    try:
        connection.open()
    except AuthenticationError:
        if not replace_refused_certificate(settings, used):
            raise
        connection.open()
    return connection
