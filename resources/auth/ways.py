"""The ways to begin: any one of four is enough. Which are open is read from the files and settings alone."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from resources.auth import clock
from resources.auth.authentik import API_BUTTON, APP_BUTTON
from resources.auth.certificate import Certificate
from resources.auth.credentials import Credentials, CredentialsFile, Source
from resources.auth.errors import AccessError, BootstrapError, RefusedError, UnsafeFileError
from resources.auth.key_files import certificate_path, read_certificate
from resources.settings import Settings

_SCRIPT = "scripts/refresh_step_auth.py"
_ASK_FOR_TOKEN = (
    "read -rs ASC_AUTHENTIK_API_TOKEN && export ASC_AUTHENTIK_API_TOKEN && "
    f"{_SCRIPT} --rotate-credentials --refresh-step-after-rotate"
)
_ASK_FOR_PASSWORD = f"read -rs ASC_OIDC_APP_PASSWORD && export ASC_OIDC_APP_PASSWORD && {_SCRIPT}"


@dataclass(frozen=True)
class AccessState:
    """The files and settings on this machine that decide about access.

    Attributes:
        settings: say where the files are.
        now: when the files were read.
        certificate: beside the key, valid or not; or why there is none.
        credentials: in the credentials file; None where there is none; or why it is not used.
    """

    settings: Settings
    now: datetime
    certificate: Certificate | AccessError
    credentials: Credentials | UnsafeFileError | None

    @property
    def valid_certificate(self) -> Certificate | None:
        """The certificate, if servers accept it now."""
        found = self.certificate
        return found if isinstance(found, Certificate) and not found.validity_problem(self.now) else None

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
    def stored_problem(self) -> str:
        """The same with the name of the file."""
        state = self.credentials_state
        return f"{self.settings.credentials_file}: {state}" if state and not self.credentials_problem else state

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
    def key_alone(self) -> bool:
        """Whether no ASC_ variable is set: the key, or a certificate got by hand, is all that there is to be."""
        return not any(name.startswith(_ASC_FIELDS) for name in self.settings.model_fields_set)

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


def read_access(settings: Settings) -> AccessState:
    """Read the files. No network, no lock."""
    assert settings.edge_node_key_path
    certificate: Certificate | AccessError
    credentials: Credentials | UnsafeFileError | None
    try:
        certificate = read_certificate(settings.edge_node_key_path)
    except AccessError as error:
        certificate = error
    try:
        credentials = CredentialsFile(settings.credentials_file).read()
    except UnsafeFileError as error:
        credentials = error
    return AccessState(settings, clock.now(), certificate, credentials)


_ASC_FIELDS = ("oidc_", "authentik_", "step_")


def plain_key(access: AccessState) -> bool:
    """Whether the site takes plain keys: there is a key, no certificate beside it, and no ASC_ variable is set."""
    key = access.settings.edge_node_key_path
    assert key
    return access.key_alone and key.is_file() and not certificate_path(key).exists()


def explain_rotation(access: AccessState, refusals: Mapping[Source, str]) -> RefusedError:
    """Return why the stored secrets cannot be replaced, and the command that makes them anew.

    Args:
        access: what lies on this machine.
        refusals: what authentik has said, by `stored` and `bootstrap`.
    """
    file, lacking = access.settings.credentials_file, _lacking_api(access)
    token = "set" if access.settings.authentik_api_token else "not set"
    reasons = [
        f"the API token in {file}: {refusals['stored']}" if "stored" in refusals else access.stored_problem,
        f"ASC_AUTHENTIK_API_TOKEN: {refusals.get('bootstrap') or token}",
        lacking,
    ]
    return RefusedError(
        f"The stored secrets cannot be replaced: {'; '.join(reason for reason in reasons if reason)}. "
        f"To replace them by hand, {_make_token(access)}\n  {_ASK_FOR_TOKEN}"
    )


@dataclass(frozen=True)
class _Way:
    """One of the ways to begin.

    Attributes:
        name: what it is.
        variable: the setting that names or holds it.
        closed: why it is not open; empty if nothing is known against it.
        advice: what opens it.
        command: to type for that; empty if there is none.
    """

    name: str
    variable: str
    closed: str
    advice: str
    command: str = ""

    def render(self, number: int) -> str:
        """Return its paragraph in an error's text."""
        lines = [
            f"  {number}. {self.name}: {self.variable}",
            f"     status: {self.closed or 'present, but it did not help'}",
            f"     to do: {self.advice}",
            *([f"       {self.command}"] if self.command else []),
        ]
        return "\n".join(lines)


def explain(access: AccessState, refusals: Mapping[Source, str]) -> BootstrapError:
    """Return the four ways, why none is open, and what opens each; without the first if a certificate still works.

    Args:
        access: what lies on this machine.
        refusals: what servers have said, by `stored`, `bootstrap` and `direct`.
    """
    settings, certificate = access.settings, access.valid_certificate
    enough = "One of these is enough, and none holds:"
    head = (
        f"The certificate works until {clock.written(certificate.valid_before)}, but is not renewed. {enough}"
        if certificate
        else f"No access to {settings.edge_node_host}. {enough}"
    )
    ways = [*_ways(access, refusals), *([_plain_way(access)] if access.key_alone else [])]
    shown = [way.render(number) for number, way in enumerate(ways, 1) if number > 1 or not certificate]
    if access.lacking:
        shown.append(f"Ways 2 to 4 need this besides: {', '.join(access.lacking)} not set (docs/settings.md)")
    return BootstrapError("\n".join([head, *shown]))


def _ways(access: AccessState, refusals: Mapping[Source, str]) -> list[_Way]:
    settings = access.settings
    key = shlex.quote(str(settings.edge_node_key_path))
    lacking = f"{', '.join(access.lacking)} not set" if access.lacking else ""
    not_set = "not set; it is needed only once: the credentials file then renews itself"
    return [
        _Way(
            "a valid certificate beside the key",
            f"SLURM_EDGE_NODE_KEY_PATH={settings.edge_node_key_path}",
            _certificate_problem(access),
            "log in with a browser:",
            f"step ssh certificate 'your.email@example.com' {key} --no-password --insecure --force",
        ),
        _Way(
            "stored credentials",
            f"ASC_AUTHENTIK_CREDENTIALS_FILE={settings.credentials_file}",
            refusals.get("stored") or access.credentials_state or lacking,
            "do that first" if access.credentials_problem else "way 3 makes this file anew",
        ),
        _Way(
            "an API token",
            "ASC_AUTHENTIK_API_TOKEN",
            refusals.get("bootstrap") or ("" if settings.authentik_api_token else not_set) or _lacking_api(access),
            _make_token(access),
            _ASK_FOR_TOKEN,
        ),
        _Way(
            "an app password",
            "ASC_OIDC_APP_PASSWORD",
            refusals.get("direct") or ("" if settings.oidc_app_password else "not set") or lacking,
            f"make one with {APP_BUTTON} {_page(access)}; then run this, and paste it:",
            _ASK_FOR_PASSWORD,
        ),
    ]


def _plain_way(access: AccessState) -> _Way:
    """For sites that take plain keys."""
    key = access.settings.edge_node_key_path
    assert key
    name, variable = "a plain key, where the site takes one", f"SLURM_EDGE_NODE_KEY_PATH={key}"
    if key.is_file():
        certificate = certificate_path(key)
        remove = f"rm {shlex.quote(str(certificate))}"
        return _Way(name, variable, f"{certificate} lies beside it", "if that is of no use:", remove)
    make = f"ssh-keygen -t ed25519 -N '' -f {shlex.quote(str(key))}"
    return _Way(name, variable, f"{key} does not exist", f"make one, and give the site {key.name}.pub:", make)


def _make_token(access: AccessState) -> str:
    return f"make an API token with {API_BUTTON} {_page(access)}; then run this, and paste it:"


def _page(access: AccessState) -> str:
    base = access.settings.authentik_api_base or "https://<ASC_AUTHENTIK_API_BASE>"
    return f"at {base.rstrip('/')}/if/user/#/settings, Tokens and App passwords"


def _certificate_problem(access: AccessState) -> str:
    """Return why the certificate is not valid."""
    found = access.certificate
    if isinstance(found, AccessError):
        return str(found)
    return found.validity_problem(access.now)


def _lacking_api(access: AccessState) -> str:
    lacking = [*access.lacking, *([] if access.settings.authentik_api_base else ["ASC_AUTHENTIK_API_BASE"])]
    if lacking:
        return f"{', '.join(lacking)} not set"
    problem = access.credentials_problem
    return f"the credentials file cannot be used: {problem}" if problem else ""
