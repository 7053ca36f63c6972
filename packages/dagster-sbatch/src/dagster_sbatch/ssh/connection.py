"""A fabric connection that checks host keys as OpenSSH does, and logs in with one private key and nothing else."""

import logging
import socket
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import fabric
import paramiko
from paramiko.ssh_exception import PartialAuthentication

from dagster_sbatch.errors import printable
from dagster_sbatch.ssh import HostKeyError, SshError, UnreachableError, host_key
from dagster_sbatch.ssh.client_config import Hop
from dagster_sbatch.ssh.host_key import KnownHosts
from dagster_sbatch.ssh.user_key import UserKey

CONNECT_SECONDS = 10.0
"""For TCP, to each address of the host. The system limits the lookup of the name (resolv.conf(5))."""
HANDSHAKE_SECONDS = 30.0
"""From the server's greeting to the end of the key exchange; half of it for the greeting itself."""
AUTHENTICATION_SECONDS = 30.0
CHANNEL_SECONDS = 30.0  # to open a channel, also the one through a jump host
KEEPALIVE_SECONDS = 15.0
"""Stops firewalls from dropping an idle connection. It does not detect that the other side is gone."""

# Paramiko logs what it raises, too. Without a handler of one's own, that would be printed on stderr.
logging.getLogger("paramiko").addHandler(logging.NullHandler())


class Transport(paramiko.Transport):  # type: ignore[misc]  # paramiko has no types
    """A transport that asks for host keys that can be checked, and checks the one that is shown.

    `preferred_keys` and `_verify_key` are internals of paramiko; tests/unit/test_ssh_connection.py holds them.
    """

    def __init__(self, hop: Hop, known: KnownHosts, sock: Any, **options: Any) -> None:
        self._hop, self._known, self._shown = hop, known, b""
        super().__init__(sock, **options)

    @property
    def preferred_keys(self) -> tuple[str, ...]:
        """The algorithms for host keys, the best first."""
        return host_key.preferred_algorithms(super().preferred_keys, self._hop.host, self._hop.port, self._known)

    def _verify_key(self, blob: bytes, signature: bytes) -> None:
        try:
            super()._verify_key(blob, signature)
        except paramiko.SSHException as error:
            raise HostKeyError(f"{self._hop} has not proved that it holds the host key: {text_of(error)}") from error
        self._shown = blob

    def start_client(self, event: threading.Event | None = None, timeout: float | None = None) -> None:
        """Exchange keys, and check the host key; unlike paramiko's own, it fails when time (in seconds) is up."""
        super().start_client(event, timeout)
        if not self.initial_kex_done:
            raise paramiko.SSHException(f"no key exchange within {timeout} s")
        host_key.check(self._shown, self._hop.host, self._hop.port, self._known)


class _ShowUserKey(paramiko.AuthStrategy):  # type: ignore[misc]
    """Logs in with one key: no agent, no other key, no password, no question on the terminal."""

    def __init__(self, hop: Hop, key: UserKey) -> None:
        super().__init__(ssh_config=paramiko.SSHConfig())
        self._hop, self._key = hop, key

    def authenticate(self, transport: paramiko.Transport) -> None:
        """Log in; raises AuthenticationError if the server refused the key, SSHException if it did not answer."""
        answered = threading.Event()
        transport.auth_publickey(self._hop.user, self._key.private, answered)
        if not answered.wait(AUTHENTICATION_SECONDS):
            raise paramiko.SSHException(f"no answer to the login within {AUTHENTICATION_SECONDS} s")
        if transport.is_authenticated():
            return
        error = transport.get_exception()
        if not transport.is_active():
            raise error or paramiko.SSHException("the connection was closed during the login")
        partial = isinstance(error, PartialAuthentication)
        methods = list(getattr(error, "allowed_types", [])) or self._ask_methods(transport)
        raise self._key.refused(self._hop, methods, partial=partial)

    def _ask_methods(self, transport: paramiko.Transport) -> list[str]:
        """Return the ways to log in that the server names; none if it does not answer."""
        try:
            transport.auth_none(self._hop.user)
        except (paramiko.SSHException, EOFError) as error:
            return list(getattr(error, "allowed_types", []))
        return []


class Connection(fabric.Connection):  # type: ignore[misc]  # fabric has no types
    """A connection to one machine, perhaps through another.

    Args:
        hop: the machine.
        gateway: the connection to the jump host, opened and closed with this one.
        before_opening: called before each attempt.
        host_authorities: of the site.
    """

    def __init__(
        self,
        hop: Hop,
        gateway: "Connection | None",
        before_opening: Callable[[], object],
        host_authorities: Sequence[str],
    ) -> None:
        # `lazy` keeps fabric from reading ~/.fabric.yml and the like, an empty SSHConfig from reading ~/.ssh/config;
        # and run() is not to take this program's own standard input for the command's.
        overrides = {"run": {"in_stream": False}}
        config = fabric.Config(lazy=True, ssh_config=paramiko.SSHConfig(), overrides=overrides)
        super().__init__(hop.host, user=hop.user, port=hop.port, config=config, gateway=gateway)
        self._set(_hop=hop, _before_opening=before_opening, _host_authorities=host_authorities)

    def open(self) -> None:
        """Connect, check the host key, log in; do nothing if it is open. Raises as `ssh.connect`."""
        if self.is_connected:
            return
        self.close()
        self._before_opening()
        hop: Hop = self._hop
        key = UserKey.load(hop.key)
        known = KnownHosts.read(hop.known_hosts, self._host_authorities)
        # Its own list of known keys stays empty: the transport has checked the key.
        self.client.set_missing_host_key_policy(paramiko.MissingHostKeyPolicy())
        self.connect_kwargs = {
            "transport_factory": partial(Transport, hop, known),
            "auth_strategy": _ShowUserKey(hop, key),
            "timeout": HANDSHAKE_SECONDS,
            "banner_timeout": HANDSHAKE_SECONDS / 2,
            "channel_timeout": CHANNEL_SECONDS,
        }
        try:
            if self.gateway is None:
                self.connect_kwargs["sock"] = _connect_tcp(hop)
            super().open()
        except BaseException as error:
            self.close()
            if isinstance(error, paramiko.IncompatiblePeer):
                raise SshError(f"{hop} and this program have no SSH algorithm in common: {text_of(error)}") from error
            if isinstance(error, OSError | EOFError | paramiko.SSHException):
                raise UnreachableError(_describe(error, hop, self.gateway)) from error
            raise
        self.transport.set_keepalive(KEEPALIVE_SECONDS)

    def close(self) -> None:
        """Close it, at any stage, and then the jump host's."""
        super().close()
        self.client.close()
        if self.gateway is not None:
            self.gateway.close()


def _connect_tcp(hop: Hop) -> socket.socket:
    connection = socket.create_connection((hop.host, hop.port), CONNECT_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _describe(error: Exception, hop: Hop, gateway: Connection | None) -> str:
    through = f" through the jump host {gateway.host}" if gateway else ""
    if isinstance(error, socket.gaierror):
        reason = f"the name is not known ({error.strerror}). Check its spelling, the network and the VPN"
    elif isinstance(error, ConnectionRefusedError):
        reason = "it refuses connections. SSH is off there, or SLURM_EDGE_NODE_PORT is not its port"
    else:
        reason = text_of(error)
    return f"{hop} cannot be reached{through}: {reason}"


def text_of(error: Exception) -> str:
    """Return an error of a connection in words: some have none, and paramiko writes others as code."""
    said = error.text if isinstance(error, paramiko.ChannelException) else str(error)
    wordless = {EOFError: "the connection was closed", TimeoutError: "no answer in time"}
    return printable(said) or wordless.get(type(error), type(error).__name__)
