"""authentik: its token API, and OIDC tokens in exchange for an app password.

Source: https://docs.goauthentik.io (API v3 `core/tokens`, OAuth2 machine-to-machine), exchanges recorded from version
2025.12, and a comparison with 2026.5.
"""

import base64
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from dagster_sbatch.auth.access_errors import AccessError, RejectedError, UnavailableError
from dagster_sbatch.auth.http import TRIES, Http, HttpAnswer
from dagster_sbatch.errors import printable
from dagster_sbatch.settings import Settings

SCOPE = "openid profile email"
NEVER = datetime(9999, 1, 1, tzinfo=UTC)
API_BUTTON = "'New Token' (before 2026.2: 'Create Token')"
APP_BUTTON = "'New App Password' (before 2026.2: 'Create App password')"
Intent = Literal["api", "app_password"]
_ME = "/users/me/"
_ADDRESS = "Check ASC_AUTHENTIK_API_BASE, or ask the centre with this text"


class Authentik:
    """The token API, as the user that an API token belongs to."""

    def __init__(self, base: str, api_token: str, http: Http) -> None:
        """`base`: ASC_AUTHENTIK_API_BASE."""
        self._base = base.rstrip("/") + "/api/v3/core"
        self._headers = {"Authorization": f"Bearer {api_token}", "Accept": "application/json"}
        self._usable = api_token.isascii() and api_token.isprintable() and " " not in api_token
        self._http = http

    def user(self, tries: int = TRIES) -> str:
        """Return the user name that the token belongs to: the cheapest proof that it works.

        Raises RejectedError: unknown, expired, an app password, or of a user that is not active: the server answers
        alike.
        """
        answer = self._call("GET", _ME, tries=tries)
        try:
            return str(answer.data["user"]["username"])
        except (TypeError, KeyError):
            raise AccessError(f"{self._base}{_ME} answered without a user ({answer.reason}). {_ADDRESS}") from None

    def create(self, identifier: str, intent: Intent) -> datetime:
        """Make a token of that name; return when it expires, by the server's clock (NEVER if it does not).

        A retry after a lost answer finds the token that the first request has made.
        """
        body = {"identifier": identifier, "intent": intent, "description": "Made and replaced by dagster-sbatch"}
        answer = self._call("POST", "/tokens/", body)
        if answer.status == 400 and "identifier" in (answer.data or {}):
            answer = self._call("GET", f"/tokens/{identifier}/")
        if answer.status == 403:
            raise AccessError(
                f"authentik does not allow this user to make tokens ({answer.reason}). Ask the centre to allow it"
            )
        try:
            written = answer.data["expires"]
            return datetime.fromisoformat(written).astimezone(UTC) if written else NEVER
        except (TypeError, KeyError, ValueError, OverflowError):
            text = f"authentik did not make a token {identifier!r}, or did not say when it expires ({answer.reason})"
            raise AccessError(f"{text}. {_ADDRESS}") from None

    def view_key(self, identifier: str) -> str:
        """Return the secret of a token of one's own.

        Raises UnavailableError: the right to see it is missing, as after a crash of authentik between two steps.
        """
        answer = self._call("GET", f"/tokens/{identifier}/view_key/")
        if answer.status == 403:
            raise UnavailableError(
                f"authentik has made {identifier!r} without the right to see its secret ({answer.reason}). The next "
                "retry makes another token. If this repeats, ask the centre to let users see their own tokens"
            )
        if answer.status != 200 or not isinstance(answer.data, dict) or not answer.data.get("key"):
            raise AccessError(f"authentik did not show the key of {identifier!r} (HTTP {answer.status}). {_ADDRESS}")
        return str(answer.data["key"])

    def delete(self, identifier: str) -> None:
        """Delete a token of one's own, if it is there."""
        answer = self._call("DELETE", f"/tokens/{identifier}/", tries=1)
        if answer.status not in (204, 404):
            raise AccessError(f"authentik did not delete {identifier!r} ({answer.reason}). {_ADDRESS}")

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None, tries: int = TRIES) -> HttpAnswer:
        """Call the API; a 403 is returned only if the token works, so the user lacks a right.

        The texts do not tell: authentik translates them.
        """
        if not self._usable:
            raise RejectedError("it has characters that no token has, perhaps because it was not pasted whole")
        answer = self._http.call(method, self._base + path, headers=self._headers, json=body, tries=tries)
        if answer.status in (401, 403) and path == _ME:
            raise RejectedError(f"authentik refused it ({answer.reason})")
        if answer.status in (401, 403):
            self.user()
        return answer


@dataclass(frozen=True)
class OidcToken:
    """An OIDC token; the certificate authority accepts each once."""

    value: str = field(repr=False)  # the JWT
    email: str  # of the user, from which the authority derives the login names
    issued: datetime  # by authentik's clock
    expires: datetime  # by the same clock
    issuer: str  # the claim `iss`, which authentik derives from the name that it was called by
    audience: str  # the claim `aud`


def request_oidc_token(settings: Settings, app_password: str, http: Http) -> OidcToken:
    """Exchange an app password for an OIDC token.

    Raises RejectedError: authentik does not accept the app password, or the user for this application; it answers
    alike.
    Raises AccessError: the client id is not known, or the token lacks what the certificate authority needs.
    """
    assert settings.oidc_token_url and settings.oidc_client_id and settings.oidc_username
    form = {
        "grant_type": "client_credentials",
        "client_id": settings.oidc_client_id,
        "username": settings.oidc_username,
        "password": app_password,
        "scope": SCOPE,
    }
    answer = http.call("POST", settings.oidc_token_url, data=form)
    error = answer.data.get("error") if isinstance(answer.data, dict) else None
    if error == "invalid_grant":
        raise RejectedError(f"authentik refused it for ASC_OIDC_USERNAME={settings.oidc_username} ({error})")
    if error == "invalid_client":
        raise AccessError(
            f"authentik does not know ASC_OIDC_CLIENT_ID={settings.oidc_client_id}. Correct that "
            "setting: the centre's documentation has it"
        )
    if answer.status != 200:
        raise AccessError(
            f"ASC_OIDC_TOKEN_URL={settings.oidc_token_url} did not give a token ({answer.reason}). Check that address"
        )
    try:
        return _parse_token(answer.data["id_token"])
    except (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError) as problem:
        lacks = str(problem) if type(problem) is ValueError else "it is missing or cannot be read"
        raise AccessError(
            f"authentik's OIDC token (id_token) cannot be used for a certificate: {lacks}. Tell the centre, "
            f"with ASC_OIDC_CLIENT_ID={settings.oidc_client_id}"
        ) from None


def _parse_token(value: str) -> OidcToken:
    """Read what a JWT says of itself. Its signature is for the certificate authority to check."""
    parts = value.split(".")
    if len(parts) == 5:
        raise ValueError("it is encrypted; encryption must be off for the provider at authentik")
    claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    if not claims.get("email"):
        raise ValueError(
            "it has no email. Either your user at authentik has none (see your profile there), or the provider has "
            "'Include claims in id_token' off, or it does not map the scope email"
        )
    issued, expires = (datetime.fromtimestamp(int(claims[name]), UTC) for name in ("iat", "exp"))
    return OidcToken(
        value, printable(str(claims["email"])), issued, expires, str(claims.get("iss")), str(claims.get("aud"))
    )
