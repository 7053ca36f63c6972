"""The ways to begin: any one of four is enough. Which are open is told from the files and settings alone."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from resources.auth import clock
from resources.auth.certificate import Certificate, CertificateError, certificate_path, read_certificate
from resources.auth.credentials import Credentials, CredentialsFile, Source
from resources.auth.errors import BootstrapError, RefusedError, UnsafeFileError
from resources.settings import Settings

_SCRIPT = "scripts/refresh_step_auth.py"
_ASK_FOR_TOKEN = (
    "read -rs ASC_AUTHENTIK_API_TOKEN && export ASC_AUTHENTIK_API_TOKEN && "
    f"{_SCRIPT} --rotate-credentials --refresh-step-after-rotate"
)
_ASK_FOR_PASSWORD = f"read -rs ASC_OIDC_APP_PASSWORD && export ASC_OIDC_APP_PASSWORD && {_SCRIPT}"


@dataclass(frozen=True)
class Access:
    """What lies on this machine.

    Attributes:
        settings: that say where.
        now: when it was looked at.
        certificate: beside the key, valid or not; or why there is none.
        credentials: in the credentials file; None where there is none; or why it is not used.
    """

    settings: Settings
    now: datetime
    certificate: Certificate | CertificateError
    credentials: Credentials | UnsafeFileError | None

    @property
    def valid_certificate(self) -> Certificate | None:
        """The certificate, if servers accept it now."""
        found = self.certificate
        return found if isinstance(found, Certificate) and found.valid(self.now) else None

    @property
    def stored(self) -> Credentials:
        """The credentials; empty ones where there is no file, or one that is not used."""
        return self.credentials if isinstance(self.credentials, Credentials) else Credentials()

    @property
    def credentials_problem(self) -> str:
        """Why the credentials file is not used; empty if it is, or if there is none."""
        return str(self.credentials) if isinstance(self.credentials, UnsafeFileError) else ""

    @property
    def credentials_state(self) -> str:
        """What the credentials file lacks to be current; empty if it lacks nothing."""
        if self.credentials is None:
            return "the file is missing"
        if self.credentials_problem:
            return self.credentials_problem
        problems = []
        for name, secret in (("API token", self.stored.api_token), ("app password", self.stored.app_password)):
            if secret is None:
                problems.append(f"it has no {name}")
            elif secret.expires and secret.expired(self.now):
                problems.append(f"its {name} expired at {clock.written(secret.expires)}")
        return " and ".join(problems)

    @property
    def lacking(self) -> list[str]:
        """Variables without which no certificate can be asked for."""
        settings = self.settings
        needed = {
            "ASC_OIDC_CLIENT_ID": settings.oidc_client_id,
            "ASC_OIDC_USERNAME": settings.oidc_username,
            "ASC_OIDC_TOKEN_URL": settings.oidc_token_url,
            "ASC_STEP_CA_URL": settings.step_ca_url,
            "ASC_STEP_FINGERPRINT": settings.step_fingerprint,
        }
        return [name for name, value in needed.items() if value is None]

    @property
    def rotatable(self) -> bool:
        """Whether the secrets can be replaced, as far as the files tell."""
        token = self.stored.api_token
        usable = self.settings.authentik_api_token or (token is not None and not token.expired(self.now))
        return bool(usable and not self.credentials_problem and self.settings.authentik_api_base and not self.lacking)

    @property
    def renewable(self) -> bool:
        """Whether a certificate can be asked for, as far as the files tell."""
        password = self.stored.app_password
        usable = self.settings.oidc_app_password or (password is not None and not password.expired(self.now))
        return self.rotatable or bool(usable and not self.lacking)


def look(settings: Settings) -> Access:
    """Look at the files. No network, no lock."""
    assert settings.edge_node_key_path
    certificate: Certificate | CertificateError
    credentials: Credentials | UnsafeFileError | None
    try:
        certificate = read_certificate(settings.edge_node_key_path)
    except CertificateError as error:
        certificate = error
    try:
        credentials = CredentialsFile(settings.credentials_file).read()
    except UnsafeFileError as error:
        credentials = error
    return Access(settings, clock.now(), certificate, credentials)


_ASC_FIELDS = ("oidc_", "authentik_", "step_")


def plain_key(access: Access) -> bool:
    """Whether the site takes plain keys: there is a key, no certificate beside it, and no ASC_ variable is set."""
    key = access.settings.edge_node_key_path
    assert key
    asked = any(name.startswith(_ASC_FIELDS) for name in access.settings.model_fields_set)
    return not asked and key.is_file() and not certificate_path(key).exists()


def explain_rotation(access: Access) -> RefusedError:
    """Why the stored secrets cannot be replaced."""
    stored = access.credentials_state or "there, but without effect"
    direct = "set" if access.settings.authentik_api_token else "not set"
    direct += f"; {_lacking_api(access)}" if _lacking_api(access) else ""
    return RefusedError(
        f"The stored secrets cannot be replaced: {access.settings.credentials_file}: {stored}; "
        f"ASC_AUTHENTIK_API_TOKEN: {direct}. An API token makes the file anew:\n  {_ASK_FOR_TOKEN}"
    )


def explain(access: Access, refusals: Mapping[Source, str]) -> BootstrapError:
    """The four ways, why none is open, and what opens each.

    Args:
        access: what lies on this machine.
        refusals: what servers have said, by `stored`, `bootstrap` and `direct`.
    """
    settings = access.settings
    base = settings.authentik_api_base or "https://<ASC_AUTHENTIK_API_BASE>"
    tokens = f"at {base.rstrip('/')}/if/user/#/settings, Tokens and App passwords"
    key = shlex.quote(str(settings.edge_node_key_path))
    lacking = f"{', '.join(access.lacking)} not set" if access.lacking else ""
    not_set = "not set, and asked for only once: the credentials file then renews itself"
    ways = [
        (
            "a valid certificate",
            _certificate_problem(access),
            f"step ssh certificate 'your.email@example.com' {key} --no-password --insecure --force",
        ),
        (
            f"current credentials in {settings.credentials_file}",
            refusals.get("stored") or access.credentials_state or lacking,
            "see way 3, which makes this file anew",
        ),
        (
            "an API token in ASC_AUTHENTIK_API_TOKEN",
            refusals.get("bootstrap") or ("" if settings.authentik_api_token else not_set) or _lacking_api(access),
            f"make one {tokens} ('Create Token'); then, and paste it:\n       {_ASK_FOR_TOKEN}",
        ),
        (
            "an app password in ASC_OIDC_APP_PASSWORD",
            refusals.get("direct") or ("" if settings.oidc_app_password else "not set") or lacking,
            f"make one {tokens} ('Create App password'); then, and paste it:\n       {_ASK_FOR_PASSWORD}",
        ),
    ]
    lines = [
        f"  {number}. {name}\n     now: {why or 'there, but it did not help'}\n     mend: {mend}"
        for number, (name, why, mend) in enumerate(ways, 1)
    ]
    if lacking:
        lines.append(f"Ways 2 to 4 need this besides: {lacking} (docs/settings.md)")
    host = settings.edge_node_host
    return BootstrapError(f"No access to {host}. One of these is enough, and none holds:\n" + "\n".join(lines))


def _certificate_problem(access: Access) -> str:
    found = access.certificate
    if isinstance(found, CertificateError):
        return str(found)
    if found.valid(access.now):
        return ""
    if access.now < found.valid_after:
        return f"valid only from {clock.written(found.valid_after)} on; this machine has {clock.written(access.now)}"
    return f"expired at {clock.written(found.valid_before)} (now {clock.written(access.now)})"


def _lacking_api(access: Access) -> str:
    lacking = [*access.lacking, *([] if access.settings.authentik_api_base else ["ASC_AUTHENTIK_API_BASE"])]
    if lacking:
        return f"{', '.join(lacking)} not set"
    problem = access.credentials_problem
    return f"the credentials file has to be mended first: {problem}" if problem else ""
