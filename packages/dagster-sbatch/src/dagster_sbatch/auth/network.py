"""Reads from the process environment which certificate authorities HTTPS trusts, and which proxy it uses.

The variables are those of OpenSSL (SSL_CERT_FILE, SSL_CERT_DIR) and of curl (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and
NO_PROXY, in small or in capital letters). A blank variable counts as not set. For a value that cannot be used,
the error names the variable.
"""

import ipaddress
import os
import re
import ssl
from dataclasses import dataclass
from pathlib import Path

from dagster_sbatch.auth.access_errors import MisconfiguredError

_HOST = re.compile(r"\.?[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?(:\d{1,5})?")
_PROXY = re.compile(
    r"(?P<scheme>[A-Za-z0-9+.-]+)://([^/?#\s]*@)?(\[[0-9A-Fa-f:.]+\]|[^\s/?#@:\[\]]+)(:(?P<port>\d{1,5}))?/?"
)


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy.

    Attributes:
        variable: the environment variable that names it.
        url: its address, perhaps with a password.
    """

    variable: str
    url: str

    @property
    def encrypted(self) -> bool:
        """Whether the connection to the proxy itself uses TLS."""
        return self.url.lower().startswith("https://")

    def __str__(self) -> str:
        """Return variable and address, without the password."""
        return f"{self.variable}={_without_password(self.url)}"

    def advice(self, host: str) -> str:
        """Return what a user can do if the proxy cannot be used for a host."""
        return f"Correct the variable, or reach {host} without a proxy:\n  export NO_PROXY={host}"


def public_trust() -> ssl.SSLContext:
    """Return a context that trusts SSL_CERT_FILE, else SSL_CERT_DIR, else the public authorities.

    Raises:
        MisconfiguredError: the file or folder in the variable is missing, cannot be read, or holds no certificate.
    """
    import certifi

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    variable = trust_variable()
    if variable is None:
        context.load_verify_locations(cafile=certifi.where())
        return context
    path = Path(os.environ[variable])
    try:
        if variable == "SSL_CERT_FILE":
            if path.exists() and not path.is_file():
                raise _unusable(variable, path, "this is not a file")
            context.load_verify_locations(cafile=path)
        else:
            if not any(re.fullmatch(r"[0-9a-f]{8}\.\d+", entry.name) for entry in path.iterdir()):
                raise _unusable(
                    variable, path, "this folder holds no certificate that OpenSSL finds (`openssl rehash`)"
                )
            context.load_verify_locations(capath=path)
    except ssl.SSLError:
        raise _unusable(variable, path, "this file holds no certificate in PEM format") from None
    except (OSError, ValueError) as error:
        raise _unusable(variable, path, getattr(error, "strerror", None) or str(error)) from None
    return context


def trust_variable() -> str | None:
    """Return the name of the variable that lists the trusted authorities; None if none is set."""
    return next((name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)), None)


def proxy_for(scheme: str, host: str, port: int | None) -> Proxy | None:
    """Return the proxy for an address; None for a direct connection.

    Raises:
        MisconfiguredError: the proxy's address is malformed or of a kind that is not supported, or NO_PROXY is
            malformed.
    """
    variable = _first_set(f"{scheme}_proxy", "all_proxy")
    if variable is None or _excluded(host, port):
        return None
    value = os.environ[variable].strip()
    url = value if "://" in value else f"http://{value}"
    proxy, parts = Proxy(variable, url), _PROXY.fullmatch(url)
    if parts is None or not 0 < int(parts["port"] or 80) < 65536 or not _is_url(url):
        raise MisconfiguredError(
            f"The proxy {proxy} cannot be used: an address has the form http://host:port. {proxy.advice(host)}"
        )
    if parts["scheme"].lower() not in ("http", "https"):
        raise MisconfiguredError(
            f"The proxy {proxy} cannot be used: only http:// and https:// are supported. {proxy.advice(host)}"
        )
    return proxy


def _is_url(text: str) -> bool:
    import httpx

    try:
        return bool(httpx.URL(text).host)
    except httpx.InvalidURL:
        return False


def _first_set(*names: str) -> str | None:
    spellings = [spelling for name in names for spelling in (name, name.upper())]
    return next((spelling for spelling in spellings if os.environ.get(spelling, "").strip()), None)


def _excluded(host: str, port: int | None) -> bool:
    """Return whether NO_PROXY contains a host: its name, a domain above it, its address or a network (10.0.0.0/8)."""
    variable = _first_set("no_proxy")
    entries = re.split(r"[,\s]+", os.environ[variable].strip()) if variable else []
    return any(_matches(f"{variable}", entry, host.lower(), port) for entry in entries if entry)


def _matches(variable: str, entry: str, host: str, port: int | None) -> bool:
    if entry == "*":
        return True
    network, address = _network(entry), _network(host)
    if network and address:
        return network.version == address.version and address.subnet_of(network)  # type: ignore[arg-type]
    name = entry.removeprefix("*").lower()
    if network is None and not _HOST.fullmatch(name):
        raise MisconfiguredError(
            f"The variable {variable} cannot be used: its entry {_without_password(entry)!r} is neither a host name "
            f"nor an address. Correct it, for example:\n  export {variable}=localhost,.example.org,10.0.0.0/8"
        )
    name, _, wanted_port = name.strip(".").partition(":")
    same = host == name or (address is None and host.endswith(f".{name}"))
    return same and (not wanted_port or wanted_port == str(port))


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    """Return a network, or an address as a network of one; None for a name."""
    try:
        return ipaddress.ip_network(re.sub(r"^\[(.*)\]$", r"\1", text), strict=False)
    except ValueError:
        return None


def _without_password(url: str) -> str:
    scheme, separator, rest = url.rpartition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _unusable(variable: str, path: Path, why: str) -> MisconfiguredError:
    return MisconfiguredError(
        f"The list of trusted authorities {variable}={path} cannot be used: {why}. Correct the variable, or use the "
        f"public authorities:\n  unset {variable}"
    )
