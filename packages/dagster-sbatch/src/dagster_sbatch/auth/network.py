"""Reads from the process environment which certificate authorities HTTPS trusts, and which proxy it uses.

The variables are those of OpenSSL (SSL_CERT_FILE, SSL_CERT_DIR) and, as Python's standard library reads them,
HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY. For a value that cannot be used, the error names the variable.
"""

import os
import re
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.request import getproxies_environment, proxy_bypass

import certifi

from dagster_sbatch.auth.access_errors import MisconfiguredError

if TYPE_CHECKING:
    import httpx


MOST_PORT = 65535
LONGEST_PART = 63  # bytes between two dots of a host's name (RFC 1035)


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy."""

    variable: str  # the environment variable that names it
    url: str  # its address, perhaps with a password

    def __str__(self) -> str:
        """Return variable and address, without the password."""
        return f"{self.variable}={re.sub('//.*@', '//', self.url)}"

    def advice(self, host: str) -> str:
        """Return what a user can do if the proxy cannot be used for a host."""
        return f"Correct the variable, or reach {host} without a proxy:\n  export NO_PROXY={host}"


def names_host(url: "httpx.URL") -> bool:
    """Return whether an address has a host that can be looked up: of a name, no part is empty or too long."""
    return all(0 < len(part) <= LONGEST_PART for part in url.raw_host.removesuffix(b".").split(b"."))


def public_trust() -> ssl.SSLContext:
    """Return a context that trusts SSL_CERT_FILE, else SSL_CERT_DIR, else the public authorities.

    Raises MisconfiguredError: the file is missing, cannot be read, or holds no certificate.
    """
    context, variable = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), trust_variable()
    if variable == "SSL_CERT_DIR":
        context.load_verify_locations(capath=os.environ[variable])
        return context
    path = os.environ[variable] if variable else certifi.where()
    try:
        context.load_verify_locations(path)
    except OSError as error:
        why = "it holds no certificate in PEM format" if isinstance(error, ssl.SSLError) else error.strerror
        raise MisconfiguredError(
            f"The list of trusted authorities {variable}={path} cannot be used: {why}. Correct the variable, or use "
            f"the public authorities:\n  unset {variable}"
        ) from None
    return context


def trust_variable() -> str | None:
    """Return the name of the variable that lists the trusted authorities; None if none is set."""
    return next((name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)), None)


def proxy_for(url: "httpx.URL") -> Proxy | None:
    """Return the proxy for an address; None for a direct connection.

    Raises MisconfiguredError: the proxy's address is malformed, or of a kind that is not supported.
    """
    import httpx

    proxies = getproxies_environment()
    name = next((each for each in (url.scheme, "all") if proxies.get(each, "").strip()), None)
    if name is None or proxy_bypass(url.netloc.decode()):
        return None
    value = proxies[name].strip()
    proxy = Proxy(f"{name.upper()}_PROXY", value if "://" in value else f"http://{value}")
    try:
        address = httpx.URL(proxy.url)
    except (httpx.InvalidURL, UnicodeError):
        address = httpx.URL()
    if address.scheme not in ("http", "https") or not names_host(address) or (address.port or 0) > MOST_PORT:
        raise MisconfiguredError(
            f"The proxy {proxy} cannot be used: an address has the form http://host:port or https://host:port. "
            f"{proxy.advice(url.host)}"
        )
    return proxy
