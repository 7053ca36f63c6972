"""The OIDC provider: discovery, keys, and the token endpoint that changes an app password for JWTs."""

import base64
import hashlib
import json
import os
import secrets
import time
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from .store import Store, User

Answer = tuple[int, Any]
_SCOPES = ("openid", "email", "profile")
_ERRORS = {
    "invalid_client": "Client authentication failed (e.g., unknown client, no client authentication included, or "
    "unsupported authentication method)",
    "invalid_grant": "The provided authorization grant or refresh token is invalid, expired, revoked, does not match "
    "the redirection URI used in the authorization request, or was issued to another client",
    "unsupported_grant_type": "The authorization grant type is not supported by the authorization server",
}


class Provider:
    """An OAuth2 provider of one application; its signing key is kept in a file, made at the first start.

    Attributes:
        application: the application's slug, part of its addresses.
        client_id: the one client it knows, a public one.
    """

    def __init__(self, key_file: Path, application: str, client_id: str) -> None:
        self.application = application
        self.client_id = client_id
        self._key = _load_or_make(key_file)
        numbers = self._key.public_key().public_numbers()
        modulus = _number(numbers.n)
        self._key_id = hashlib.sha256(modulus.encode()).hexdigest()[:32]
        self._public = {"alg": "RS256", "kid": self._key_id, "kty": "RSA", "use": "sig", "n": modulus}
        self._public["e"] = _number(numbers.e)

    def discovery(self, base: str) -> Answer:
        """GET .well-known/openid-configuration, with addresses below `base`: as the client has reached us."""
        root = f"{base}/application/o/"
        issuer = self.issuer(base)
        document = {
            "issuer": issuer,
            "authorization_endpoint": f"{root}authorize/",
            "token_endpoint": f"{root}token/",
            "userinfo_endpoint": f"{root}userinfo/",
            "end_session_endpoint": f"{issuer}end-session/",
            "introspection_endpoint": f"{root}introspect/",
            "revocation_endpoint": f"{root}revoke/",
            "device_authorization_endpoint": f"{root}device/",
            "backchannel_logout_supported": True,
            "backchannel_logout_session_supported": True,
            "response_types_supported": [
                "code",
                "id_token",
                "id_token token",
                "code token",
                "code id_token",
                "code id_token token",
            ],
            "response_modes_supported": ["query", "fragment", "form_post"],
            "jwks_uri": f"{issuer}jwks/",
            "grant_types_supported": [
                "authorization_code",
                "refresh_token",
                "implicit",
                "client_credentials",
                "password",
                "urn:ietf:params:oauth:grant-type:device_code",
            ],
            "id_token_signing_alg_values_supported": ["RS256"],
            "subject_types_supported": ["public"],
            "token_endpoint_auth_methods_supported": ["client_secret_post", "client_secret_basic"],
            "acr_values_supported": ["goauthentik.io/providers/oauth2/default"],
            "scopes_supported": list(_SCOPES),
            "request_parameter_supported": False,
            "claims_supported": [
                "sub",
                "iss",
                "aud",
                "exp",
                "iat",
                "auth_time",
                "acr",
                "amr",
                "nonce",
                "email",
                "email_verified",
                "name",
                "given_name",
                "preferred_username",
                "nickname",
                "groups",
            ],
            "claims_parameter_supported": False,
            "code_challenge_methods_supported": ["plain", "S256"],
        }
        return 200, document

    def jwks(self) -> Answer:
        """GET jwks/."""
        return 200, {"keys": [self._public]}

    def issuer(self, base: str) -> str:
        """Return the issuer for clients that reach the server at `base`."""
        return f"{base}/application/o/{self.application}/"

    def token(self, store: Store, base: str, form: dict[str, str]) -> Answer:
        """POST token/: `invalid_grant`, in the same words, for a wrong, expired or deleted app password, a user that is
        unknown, not active or not allowed to use the application, and a provider without application."""
        if form.get("client_id") != self.client_id:
            return _error("invalid_client")
        if form.get("grant_type") not in ("client_credentials", "password"):
            return _error("unsupported_grant_type")
        user = store.use_token(form.get("password", ""), "app_password", form.get("username", ""))
        if user is None or not user.allowed:
            return _error("invalid_grant")
        scopes = [scope for scope in form.get("scope", "").split() if scope in _SCOPES]
        scope = " ".join(scopes)
        lifetime = int(store.settings.access_token_lifetime)
        of_access = {"scope": scope, "azp": self.client_id, "uid": secrets.token_urlsafe(30)}
        answer = {
            "access_token": self._jwt({**self._claims(store, base, user, scopes), **of_access}),
            "token_type": "Bearer",
            "scope": scope,
            "expires_in": lifetime,
            "id_token": self._jwt(self._claims(store, base, user, scopes)),
        }
        return 200, answer

    def _claims(self, store: Store, base: str, user: User, scopes: list[str]) -> dict[str, Any]:
        now = int(time.time() + store.settings.jwt_skew)
        claims: dict[str, Any] = {
            "iss": self.issuer(base),
            "sub": user.uid,
            "aud": self.client_id,
            "exp": now + int(store.settings.access_token_lifetime),
            "iat": now,
            "auth_time": now,
            "acr": "goauthentik.io/providers/oauth2/default",
            "jti": secrets.token_hex(16),
        }
        if "email" in scopes:
            claims |= {"email": user.email, "email_verified": False}
        if "profile" in scopes:
            claims |= {"name": user.name, "given_name": user.name, "preferred_username": user.username}
            claims |= {"nickname": user.username, "groups": user.groups}
        return claims

    def _jwt(self, claims: dict[str, Any]) -> str:
        header = {"alg": "RS256", "kid": self._key_id, "typ": "JWT"}
        signed = f"{_base64(json.dumps(header).encode())}.{_base64(json.dumps(claims).encode())}"
        return f"{signed}.{_base64(self._key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256()))}"


def _error(code: str) -> Answer:
    return 400, {"error": code, "error_description": _ERRORS[code], "request_id": secrets.token_hex(16)}


def _load_or_make(file: Path) -> rsa.RSAPrivateKey:
    if file.exists():
        key = serialization.load_pem_private_key(file.read_bytes(), password=None)
        if not isinstance(key, rsa.RSAPrivateKey):
            raise TypeError(f"not an RSA key: {file}")
        return key
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    encoded = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as output:
        output.write(encoded)
    return key


def _number(value: int) -> str:
    return _base64(value.to_bytes((value.bit_length() + 7) // 8, "big"))


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
