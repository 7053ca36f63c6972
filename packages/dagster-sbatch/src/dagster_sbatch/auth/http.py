"""HTTP calls that end: time limits, retries of temporary failures, and errors that say who has to act.

The process environment says which authorities are trusted (OpenSSL's SSL_CERT_FILE, SSL_CERT_DIR), and which proxy is
used, except to this machine: HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY, as Python's standard library reads them.
"""

import json
import os
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any
from urllib.request import getproxies_environment, proxy_bypass

import certifi

from dagster_sbatch.auth.access_errors import AccessError, UnavailableError
from dagster_sbatch.errors import printable
from dagster_sbatch.settings import is_loopback

if TYPE_CHECKING:
    import httpx

TRY_SECONDS = 10.0  # between two signs of life of a server, and for the body of its answer
HEAD_SECONDS = 20.0  # for the head of the answer, and to connect
MOST_BYTES = 1 << 20  # of an answer that are read
TRIES = 3
BUDGET_SECONDS = 60.0  # for all calls of one refresh together
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 5.0  # seconds between tries; each pause is a random part of a limit that doubles
_AS_IT_IS = {"Accept-Encoding": "identity"}  # a short answer could unpack to one that fills the memory
_TEMPORARY = frozenset({408, 425, 429, 500, 502, 503, 504})
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

    Raises AccessError: the file is missing, cannot be read, or holds no certificate.
    """
    context, variable = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), trust_variable()
    path = os.environ[variable] if variable else certifi.where()
    try:
        context.load_verify_locations(**{"capath" if variable == "SSL_CERT_DIR" else "cafile": path})
    except OSError as error:
        why = "it holds no certificate in PEM format" if isinstance(error, ssl.SSLError) else error.strerror
        raise AccessError(
            f"The list of trusted authorities {variable}={path} cannot be used: {why}. Correct the variable, or use "
            f"the public authorities:\n  unset {variable}"
        ) from None
    return context


def trust_variable() -> str | None:
    """Return the name of the variable that lists the trusted authorities; None if none is set."""
    return next((name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)), None)


def proxy_for(url: "httpx.URL") -> Proxy | None:
    """Return the proxy for an address; None for a direct connection.

    Raises AccessError: the proxy's address is malformed, or of a kind that is not supported.
    """
    import httpx

    proxies = getproxies_environment()
    name = next((each for each in (url.scheme, "all") if proxies.get(each, "").strip()), None)
    if name is None or is_loopback(url.host) or proxy_bypass(url.netloc.decode()):
        return None
    value = proxies[name].strip()
    proxy = Proxy(f"{name.upper()}_PROXY", value if "://" in value else f"http://{value}")
    try:
        address = httpx.URL(proxy.url)
    except (httpx.InvalidURL, UnicodeError):
        address = httpx.URL()
    if address.scheme not in ("http", "https") or not names_host(address) or (address.port or 0) > MOST_PORT:
        raise AccessError(
            f"The proxy {proxy} cannot be used: an address has the form http://host:port or https://host:port. "
            f"{proxy.advice(url.host)}"
        )
    return proxy


@dataclass(frozen=True)
class HttpAnswer:
    """A server's answer."""

    status: int  # HTTP status
    data: Any = field(repr=False)  # the JSON document; None for an empty answer
    date: datetime | None  # the server's clock, if the answer has it

    @property
    def reason(self) -> str:
        """Return the server's own words, shortened, for an error's text; never the content of a success."""
        if isinstance(self.data, dict):
            for name in ("detail", "error_description", "message", "error"):
                if isinstance(self.data.get(name), str):
                    return f"HTTP {self.status}: {printable(self.data[name][:300])}"
        return f"HTTP {self.status}" + (f": {json.dumps(self.data)[:300]}" if self.status >= 400 else "")


class Http:
    """Makes the calls of one refresh, within BUDGET_SECONDS."""

    def __init__(self) -> None:
        self._ends = time.monotonic() + BUDGET_SECONDS

    def remaining(self) -> float:
        """Return the seconds that are left of the budget."""
        return self._ends - time.monotonic()

    def call(
        self, method: str, url: str, *, trust: ssl.SSLContext | None = None, tries: int = TRIES, **content: Any
    ) -> HttpAnswer:
        """Send a request, up to `tries` times while the server does not answer, or says that it cannot answer now.

        `url`: where to; a redirection is not followed. `trust`: for https; by default what the environment says, else
        the public authorities. `tries`: 1 where the body serves once only. `content`: what httpx calls so.
        Raises UnavailableError: no usable answer in time, HTTP 5xx, or an error page that is not the server's own.
        Raises AccessError: another server than was meant (a wrong certificate, a redirection, no JSON), or
        variables of the environment that cannot be used (certificates, proxies).
        """
        failures = 0
        while True:
            if self.remaining() <= 0:
                raise UnavailableError(f"{url}: there is no time left for another try")
            try:
                return self._send(trust, method, url, **content)
            except UnavailableError:
                failures += 1
                pause = random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2**failures))  # noqa: S311 (jitter)
                if failures >= tries or pause >= self.remaining():
                    raise
                time.sleep(pause)

    def _send(self, trust: ssl.SSLContext | None, method: str, url: str, **content: Any) -> HttpAnswer:
        """Send a request once."""
        import httpx

        try:
            address = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise AccessError(f"{url} is not a URL: {error}") from None
        if address.host and not names_host(address):
            raise AccessError(f"{url} is not a URL: {address.host!r} is not the name of a host")
        proxy = proxy_for(address)
        to_proxy = self._public_trust if proxy and proxy.url.lower().startswith("https:") else None
        through = httpx.Proxy(proxy.url, ssl_context=to_proxy) if proxy else None
        seconds = min(TRY_SECONDS, self.remaining())
        try:
            with httpx.Client(
                verify=trust or self._public_trust, timeout=seconds, proxy=through, trust_env=False, headers=_AS_IT_IS
            ) as client:
                timer = threading.Timer(HEAD_SECONDS, _end)  # httpx's own limits are for each read alone
                trace = partial(_note_socket, timer)
                timer.start()
                try:
                    request = client.build_request(method, address, extensions={"trace": trace}, **content)
                    response = client.send(request, stream=True)
                finally:
                    timer.cancel()
                return _receive(response, proxy)
        except httpx.HTTPError as error:
            raise _explain(error, address, proxy, public=trust is None) from None

    @cached_property
    def _public_trust(self) -> ssl.SSLContext:
        return public_trust()


def _note_socket(timer: threading.Timer, event: str, said: Mapping[str, Any]) -> None:
    if event.endswith(("connect_tcp.complete", "start_tls.complete")):
        timer.args = [said["return_value"].get_extra_info("socket")]


def _end(connection: socket.socket | None = None) -> None:
    with suppress(OSError):  # it has ended
        if connection:
            socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _receive(response: "httpx.Response", proxy: Proxy | None) -> HttpAnswer:
    deadline = time.monotonic() + TRY_SECONDS
    place, status = _place(response.request.url), response.status_code
    received = bytearray()
    for chunk in response.iter_raw():
        received += chunk
        if len(received) > MOST_BYTES:
            break  # what is cut off is no JSON
        if time.monotonic() > deadline:
            raise UnavailableError(f"{place}: the answer takes longer than {TRY_SECONDS:.0f} s")
    if response.is_redirect:
        raise AccessError(f"{place} has moved. Set the new address: {printable(response.headers.get('Location', '?'))}")
    if status == 407 and proxy:
        raise _refused_by(proxy, response.request.url, "HTTP 407: it asks for a user name and a password")
    if status in _TEMPORARY:
        raise UnavailableError(f"{place}: HTTP {status}, it cannot answer now")
    date = None
    with suppress(ValueError, OverflowError):
        date = parsedate_to_datetime(response.headers.get("Date", "")).replace(tzinfo=UTC)  # it is always GMT
    return HttpAnswer(status, _document(bytes(received), place, status), date)


def _document(body: bytes, place: str, status: int) -> Any:
    if not body.strip():
        return None
    with suppress(ValueError, RecursionError):
        return json.loads(body)
    if status < 400:
        raise AccessError(f"{place} answered, but not as expected (no JSON): is the address right?")
    raise UnavailableError(
        f"{place} answered with an error page that is not its own (HTTP {status}, no JSON). A proxy in front of it "
        "does so while the server restarts. The request is retried; if this repeats, check the address in the settings"
    )


def _place(url: "httpx.URL") -> str:
    return f"{url.scheme}://{url.netloc.decode()}{url.path}"


def _explain(error: "httpx.HTTPError", url: "httpx.URL", proxy: Proxy | None, *, public: bool) -> AccessError:
    """Return a temporary or a permanent error, which names the proxy or the trusted certificates in between."""
    import httpx

    causes = list(_causes(error))
    place = f"{_place(url)} (through the proxy {proxy})" if proxy else _place(url)
    untrusted = next((cause for cause in causes if isinstance(cause, ssl.SSLCertVerificationError)), None)
    if untrusted:
        return _untrusted(place, untrusted.verify_message, public=public)
    words = re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__
    if isinstance(error, httpx.TimeoutException):
        words = f"no answer within {TRY_SECONDS:.0f} s"
    connecting = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
    if proxy and connecting and not any(isinstance(cause, ssl.SSLError) for cause in causes):
        return AccessError(f"The proxy {proxy} cannot be reached: {words}. {proxy.advice(url.host)}")
    if proxy and isinstance(error, httpx.ProxyError) and not re.match(r"5\d\d", words):
        return _refused_by(proxy, url, words)
    if isinstance(error, httpx.UnsupportedProtocol | httpx.LocalProtocolError):
        return AccessError(f"{place}: {words}. Check the address in the settings")
    return UnavailableError(f"{place} cannot be reached: {words}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _untrusted(place: str, why: str, *, public: bool) -> AccessError:
    variable = trust_variable() if public else None
    hint = " If your network decrypts TLS, set SSL_CERT_FILE to its authorities; else tell the centre" if public else ""
    if variable:
        hint = f" The authorities are those of {variable}; to use the public ones:\n  unset {variable}"
    return AccessError(f"{place}: its TLS certificate is not trusted: {why}.{hint}")


def _refused_by(proxy: Proxy, url: "httpx.URL", words: str) -> AccessError:
    return AccessError(f"The proxy {proxy} refused to connect to {url.host}: {words}. {proxy.advice(url.host)}")
