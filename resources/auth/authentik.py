"""authentik: its token API, and OIDC tokens in exchange for an app password.

Source: https://docs.goauthentik.io (API v3 `core/tokens`, OAuth2 machine-to-machine), and exchanges recorded from
version 2025.12.
"""

import base64
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from resources.auth.errors import MisconfiguredError, RefusedError
from resources.auth.http import Answer, Http
from resources.settings import Settings

SCOPE = "openid profile email"
NEVER = datetime(9999, 1, 1, tzinfo=UTC)
Intent = Literal["api", "app_password"]


class Authentik:
    """The token API, as the user that an API token belongs to."""

    def __init__(self, base: str, api_token: str, http: Http) -> None:
        """`base`: ASC_AUTHENTIK_API_BASE."""
        self._base = base.rstrip("/") + "/api/v3/core"
        self._headers = {"Authorization": f"Bearer {api_token}", "Accept": "application/json"}
        self._usable = api_token.isascii() and api_token.isprintable() and " " not in api_token
        self._http = http

    def user(self) -> str:
        """The user name that the token belongs to: the cheapest proof that it works.

        Raises:
            RefusedError: unknown, expired, or an app password: the server does not tell these apart.
        """
        answer = self._call("GET", "/users/me/")
        try:
            return str(answer.data["user"]["username"])
        except (TypeError, KeyError):
            raise MisconfiguredError(f"{self._base}/users/me/ answered without a user: {answer.reason}") from None

    def create(self, identifier: str, intent: Intent) -> datetime:
        """Make a token of that name; when it expires, by the server's clock (NEVER if it does not).

        Asked again after a lost answer, it finds the token that the first request has made.
        """
        body = {"identifier": identifier, "intent": intent, "description": "Made and replaced by musica-pipelines"}
        answer = self._call("POST", "/tokens/", body)
        if answer.status == 400 and "identifier" in (answer.data or {}):
            answer = self._call("GET", f"/tokens/{identifier}/")
        if answer.status not in (200, 201):
            raise MisconfiguredError(f"authentik did not make a token {identifier!r}: {answer.reason}")
        try:
            written = answer.data["expires"]
            return datetime.fromisoformat(written).astimezone(UTC) if written else NEVER
        except (TypeError, KeyError, ValueError):
            raise MisconfiguredError(f"authentik did not say when {identifier!r} expires: {answer.reason}") from None

    def view_key(self, identifier: str) -> str:
        """The secret of a token of one's own."""
        answer = self._call("GET", f"/tokens/{identifier}/view_key/")
        if answer.status != 200 or not isinstance(answer.data, dict) or not answer.data.get("key"):
            raise MisconfiguredError(f"authentik did not show the key of {identifier!r}: HTTP {answer.status}")
        return str(answer.data["key"])

    def delete(self, identifier: str) -> None:
        """Delete a token of one's own; one that is gone already is fine."""
        answer = self._call("DELETE", f"/tokens/{identifier}/")
        if answer.status not in (204, 404):
            raise MisconfiguredError(f"authentik did not delete {identifier!r}: {answer.reason}")

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Answer:
        if not self._usable:
            raise RefusedError("it holds characters that no token has: was it pasted whole?")
        answer = self._http.call(method, self._base + path, headers=self._headers, json_body=body)
        if answer.status in (401, 403):
            raise RefusedError(f"authentik refused it ({answer.reason})")
        return answer


@dataclass(frozen=True)
class OidcToken:
    """An OIDC token; the certificate authority accepts each once.

    Attributes:
        value: the JWT.
        email: of the user, from which the authority derives the login names.
        issued: by authentik's clock.
        expires: likewise.
    """

    value: str = field(repr=False)
    email: str
    issued: datetime
    expires: datetime


def request_oidc_token(settings: Settings, app_password: str, http: Http) -> OidcToken:
    """Change an app password for an OIDC token.

    Raises:
        RefusedError: the app password is wrong, expired or deleted, or of another user than ASC_OIDC_USERNAME.
        MisconfiguredError: the client id is not known, or the token lacks what the certificate authority needs.
    """
    assert settings.oidc_token_url and settings.oidc_client_id and settings.oidc_username
    form = {
        "grant_type": "client_credentials",
        "client_id": settings.oidc_client_id,
        "username": settings.oidc_username,
        "password": app_password,
        "scope": SCOPE,
    }
    answer = http.call("POST", settings.oidc_token_url, form=form)
    error = answer.data.get("error") if isinstance(answer.data, dict) else None
    if error == "invalid_grant":
        raise RefusedError(
            f"authentik refused it for ASC_OIDC_USERNAME={settings.oidc_username} ({answer.reason}); it is wrong, "
            "expired, deleted or of another user"
        )
    if error == "invalid_client":
        raise MisconfiguredError(f"authentik does not know ASC_OIDC_CLIENT_ID={settings.oidc_client_id}")
    if answer.status != 200:
        raise MisconfiguredError(f"ASC_OIDC_TOKEN_URL={settings.oidc_token_url}: {answer.reason}")
    try:
        return _parse_token(answer.data["id_token"])
    except (KeyError, TypeError, ValueError):
        raise MisconfiguredError(
            "authentik's OIDC token lacks email or times: the scopes 'openid profile email' must be allowed for "
            f"ASC_OIDC_CLIENT_ID={settings.oidc_client_id}"
        ) from None


def _parse_token(value: str) -> OidcToken:
    """What a JWT says of itself. Its signature is for the certificate authority to check."""
    middle = value.split(".")[1]
    claims = json.loads(base64.urlsafe_b64decode(middle + "=" * (-len(middle) % 4)))
    issued, expires = (datetime.fromtimestamp(int(claims[name]), UTC) for name in ("iat", "exp"))
    if not claims["email"]:
        raise ValueError("no email")
    return OidcToken(value, str(claims["email"]), issued, expires)
