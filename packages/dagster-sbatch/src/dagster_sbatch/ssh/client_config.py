"""Where to log in, and as whom: the settings, filled in from ~/.ssh/config (ssh_config(5))."""

import getpass
import ipaddress
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from paramiko import SSHConfig
from paramiko.ssh_exception import ConfigParseError

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.settings import Settings
from dagster_sbatch.ssh.host_key import warn_once

SYSTEM_KNOWN_HOSTS = Path("/etc/ssh/ssh_known_hosts")

_READ = frozenset({"hostname", "port", "user", "proxyjump", "identityfile", "userknownhostsfile"})
_REPORTED = frozenset(
    {"hostkeyalias", "proxycommand", "certificatefile", "globalknownhostsfile", "revokedhostkeys", "knownhostscommand"}
)
"""Ignored, though they change which machine is reached or trusted: reported if they are set for the host."""

_JUMP = re.compile(r"(?:ssh://)?(?:(?P<user>[^@]+)@)?(?P<host>\[[^]]+\]|[^:,]+)(?::(?P<port>\d+))?")

_NAME = re.compile(r"(?=[A-Za-z0-9_])([A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}(?<=[A-Za-z0-9_])")
"""Of a host: Python cannot look up one with an empty part, or with one of more than 63 characters (RFC 1035)."""

_COMMENT = re.compile(r'^((?:"[^"]*"|[^"])*?)\s#.*')
"""Behind an option, as OpenSSH reads it from version 8.7 on; paramiko does not."""


@dataclass(frozen=True)
class Hop:
    """A machine to log in to."""

    host: str  # name or address; host keys and certificates are checked for it
    port: int
    user: str
    key: Path  # the private key; its certificate is the file beside it whose name ends in `-cert.pub`
    known_hosts: tuple[Path, ...]  # files with the keys that are trusted

    def __str__(self) -> str:
        return f"{self.host} (port {self.port})"


def read_route(settings: Settings) -> tuple[Hop, Hop | None]:
    """Return the login node and, with ProxyJump, the jump host before it.

    Raises ConfigurationError: no host or key is named, there is more than one jump host, ~/.ssh/config is not valid, or
    the user who runs this has no name.
    """
    if settings.edge_node_host is None:
        raise ConfigurationError("SLURM_EDGE_NODE_HOST is not set. Set it to the name of the login node")
    file = Path("~/.ssh/config").expanduser()
    try:
        config = SSHConfig.from_text(_without_ignored(file))
    except ConfigParseError as error:
        raise ConfigurationError(f"{file}: {error}") from None
    port = settings.edge_node_port if "edge_node_port" in settings.model_fields_set else None
    ours = _Login(settings.edge_node_user, port, settings.edge_node_key_path)
    try:
        oneself = getpass.getuser()  # which paramiko asks for, too
    except (KeyError, OSError):
        raise ConfigurationError(
            f"This machine has no name for the user who runs this program (uid {os.getuid()}), as in some containers. "
            "Give it one:\n  export USER=dagster"
        ) from None
    login, jump = _read_hop(config, settings.edge_node_host, ours, _Login(oneself, 22, None))
    if jump == "none":
        return login, None
    user, alias, port = _split_jump(jump)
    gateway, outer = _read_hop(config, alias, _Login(user, port, None), _Login(login.user, 22, login.key))
    if outer != "none" and _split_jump(outer)[1] != alias:  # with `Host *`, a jump host would jump over itself
        raise ConfigurationError(
            f"~/.ssh/config: {alias} is itself behind {outer}, and only one jump host is supported. "
            "Name a jump host that this machine reaches directly"
        )
    return login, gateway


@dataclass(frozen=True)
class _Login:
    """How to log in, where that is known."""

    user: str | None
    port: int | None
    key: Path | None


def _read_hop(config: SSHConfig, alias: str, first: _Login, default: _Login) -> tuple[Hop, str]:
    """Return a host as the user calls it, from `first`, else ~/.ssh/config, else `default`; and its ProxyJump."""
    file = Path("~/.ssh/config").expanduser()
    found = config.lookup(alias)
    for option in sorted(_REPORTED & {name for name, value in found.items() if value}):
        warn_once(f"{file}: {option} is ignored here, though it is set for {alias}")
    port = found.get("port")
    if port is not None and not (port.isdecimal() and 1 <= int(port) <= 65535):
        raise ConfigurationError(f"{file}: Port {port} for {alias} is not a port. Write a number from 1 to 65535")
    keys = [Path(name) for name in found.get("identityfile", []) if name.lower() != "none"]
    key = first.key or next((key for key in keys if key.exists()), keys[0] if keys else default.key)
    if key is None:
        raise ConfigurationError("SLURM_EDGE_NODE_KEY_PATH is not set. Name your private key, like ~/.ssh/id_musica")
    listed = found.get("userknownhostsfile", "~/.ssh/known_hosts ~/.ssh/known_hosts2")
    try:
        files = [Path(name).expanduser() for name in shlex.split(listed) if name != "none"]
    except (ValueError, RuntimeError):
        wrong = f"UserKnownHostsFile {listed} for {alias} lacks a quotation mark, or names an unknown user"
        raise ConfigurationError(f"{file}: {wrong}") from None
    hop = Hop(
        host=_checked(found["hostname"], f"{file} or SLURM_EDGE_NODE_HOST"),
        port=first.port or int(port or default.port or 22),
        user=first.user or found.get("user") or str(default.user),
        key=key,
        known_hosts=(*files, SYSTEM_KNOWN_HOSTS),
    )
    jump = found.get("proxyjump", "none")
    return hop, "none" if jump.lower() == "none" else jump


def _split_jump(text: str) -> tuple[str | None, str, int | None]:
    match = _JUMP.fullmatch(text.rstrip("/"))
    if match is None:
        raise ConfigurationError(f"~/.ssh/config: ProxyJump {text} is not one host. Write it as [user@]host[:port]")
    return match["user"], match["host"].strip("[]"), int(match["port"]) if match["port"] else None


def _checked(host: str, where: str) -> str:
    """Return the host if it is a name or an address and nothing else."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        if _NAME.fullmatch(host):
            return host
    raise ConfigurationError(f"{host!r} is not the name of a host (in {where}). User and port are separate settings")


def _without_ignored(file: Path) -> str:
    """Return the text without ignored options; `Include` and `Match` are reported."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror}") from None
    kept = []
    in_match = False
    for number, whole in enumerate(lines, 1):
        line = _COMMENT.sub(r"\1", whole)
        word = re.split(r"[\s=]", line.strip(), maxsplit=1)[0].lower()
        if word == "include":
            warn_once(f"{file}:{number}: Include is ignored here. Copy the needed options from that file into this one")
        elif word == "match":
            in_match = True
            warn_once(f"{file}:{number}: Match is ignored here, with all lines until the next Host")
        elif word == "host":
            in_match = False
        if word == "userknownhostsfile":  # paramiko drops the first and the last quotation mark of its list
            line = re.sub(r"(?<=file)[\s=]*(.*?)\s*$", r' "\1"', line, count=1, flags=re.IGNORECASE)
        if word == "host" or (word in _READ | _REPORTED and not in_match):
            kept.append(line)
    return "\n".join(kept)
