"""Calls over HTTP with an end: time limits, repetition of what may pass, and errors that tell whose turn it is."""

import json
import re
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from resources.auth.errors import AccessError, MisconfiguredError, UnavailableError

if TYPE_CHECKING:
    import httpx

TRY_SECONDS = 10.0
"""Between two signs of life of a server, and for its whole answer."""
TRIES = 3
BUDGET_SECONDS = 60.0
"""For all calls of one refresh together."""
_LARGEST_ANSWER = 1 << 20
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Answer:
    """What a server said.

    Attributes:
        status: HTTP status.
        data: the JSON document; None for an empty answer.
        date: the server's clock, if it told.
    """

    status: int
    data: Any
    date: datetime | None

    @property
    def reason(self) -> str:
        """The server's own words, cut short, for an error's text."""
        if isinstance(self.data, dict):
            for name in ("detail", "error_description", "message", "error"):
                if isinstance(self.data.get(name), str):
                    return f"HTTP {self.status}: {self.data[name][:300]}"
        return f"HTTP {self.status}: {json.dumps(self.data)[:300]}"


class Http:
    """Makes the calls of one refresh, within BUDGET_SECONDS."""

    def __init__(self, budget: float = BUDGET_SECONDS) -> None:
        self._ends = time.monotonic() + budget
        self._public_trust: ssl.SSLContext | None = None

    def remaining(self) -> float:
        """Seconds that are left of the budget."""
        return self._ends - time.monotonic()

    def call(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        json_body: Any = None,
        form: Mapping[str, str] | None = None,
        trust: ssl.SSLContext | None = None,
        tries: int = TRIES,
    ) -> Answer:
        """Send a request, up to `tries` times while the server is away or says that it cannot now.

        Args:
            method: of HTTP.
            url: where to; a redirection is not followed.
            headers: of the request.
            json_body: body as JSON.
            form: body as a form.
            trust: for https; by default the public authorities.
            tries: 1 where the body serves once only.

        Raises:
            UnavailableError: no usable answer in time, or HTTP 5xx.
            MisconfiguredError: another server than was meant: a wrong certificate, a redirection, no JSON.
        """
        import httpx
        import tenacity

        if trust is None:
            trust = self._trust_for(url)

        def attempt() -> Answer:
            if self.remaining() <= 0:
                raise UnavailableError(f"{url}: no time left for another try")
            try:
                with httpx.Client(verify=trust, timeout=min(TRY_SECONDS, self.remaining())) as client:
                    return _send(client, client.build_request(method, url, headers=headers, json=json_body, data=form))
            except httpx.HTTPError as error:
                raise _explain(error, url) from None
            except httpx.InvalidURL as error:
                raise MisconfiguredError(f"{url} is not a URL: {error}") from None

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(UnavailableError),
            stop=tenacity.stop_after_attempt(tries) | tenacity.stop_before_delay(max(0.0, self.remaining())),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=5),
            reraise=True,
        )
        return retrying(attempt)

    def _trust_for(self, url: str) -> ssl.SSLContext:
        """The public authorities, once for all calls; an empty one for plain http, which is not encrypted anyway."""
        import httpx

        if httpx.URL(url).scheme == "http":
            return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._public_trust = self._public_trust or httpx.create_ssl_context()
        return self._public_trust


def _send(client: "httpx.Client", request: "httpx.Request") -> Answer:
    deadline = time.monotonic() + TRY_SECONDS
    place = f"{request.url.scheme}://{request.url.netloc.decode()}{request.url.path}"
    received = bytearray()
    response = client.send(request, stream=True)
    try:
        for chunk in response.iter_bytes():
            received += chunk
            if time.monotonic() > deadline:
                raise UnavailableError(f"{place}: the answer takes longer than {TRY_SECONDS:.0f} s")
            if len(received) > _LARGEST_ANSWER:
                raise MisconfiguredError(f"{place}: the answer is far too long")
    finally:
        response.close()
    if response.is_redirect:
        raise MisconfiguredError(f"{place} has moved to {response.headers.get('Location', '?')}: set that address")
    if response.status_code in _PASSING:
        raise UnavailableError(f"{place}: HTTP {response.status_code}, it cannot answer now")
    return Answer(response.status_code, _document(bytes(received), place), _date(response.headers.get("Date")))


def _document(body: bytes, place: str) -> Any:
    if not body.strip():
        return None
    try:
        return json.loads(body)
    except ValueError:
        raise MisconfiguredError(f"{place} answered, but not as expected (no JSON): is the address right?") from None


def _date(header: str | None) -> datetime | None:
    try:
        return parsedate_to_datetime(header or "")
    except ValueError:
        return None


def _explain(error: "httpx.HTTPError", url: str) -> AccessError:
    import httpx

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return MisconfiguredError(f"{url}: its TLS certificate is not trusted: {cause.verify_message}")
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, httpx.TimeoutException):
        return UnavailableError(f"{url}: no answer within {TRY_SECONDS:.0f} s")
    if isinstance(error, httpx.UnsupportedProtocol | httpx.ProtocolError) and not isinstance(
        error, httpx.RemoteProtocolError
    ):
        return MisconfiguredError(f"{url}: {error}")
    words = re.sub(r"^\[Errno -?\d+\] ", "", str(error))
    return UnavailableError(f"{url} cannot be reached: {words}")
