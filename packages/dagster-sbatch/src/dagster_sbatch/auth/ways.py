"""The four ways to get access: any one is enough. Which are open is read from the files and settings alone."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from dagster_sbatch import clock
from dagster_sbatch.auth.access_errors import AccessError, BootstrapError, RejectedError, UnsafeFileError
from dagster_sbatch.auth.authentik import API_BUTTON, APP_BUTTON
from dagster_sbatch.auth.credentials_file import Credentials, Source
from dagster_sbatch.auth.keys import Certificate, certificate_path, read_certificate
from dagster_sbatch.auth.refresh_failures import Failing, Part, RefreshFailures
from dagster_sbatch.settings import Settings

_SCRIPT = "scripts/refresh_step_auth.py"
_ASK_FOR_TOKEN = (
    "read -rs ASC_AUTHENTIK_API_TOKEN && export ASC_AUTHENTIK_API_TOKEN && "
    f"{_SCRIPT} --rotate-credentials --refresh-step-after-rotate"
)
_ASK_FOR_PASSWORD = f"read -rs ASC_OIDC_APP_PASSWORD && export ASC_OIDC_APP_PASSWORD && {_SCRIPT}"


@dataclass(frozen=True)
class AccessState:
    """The files and settings on this machine that decide about access."""

    settings: Settings  # say where the files are
    key: Path  # the private key, SLURM_EDGE_NODE_KEY_PATH
    now: datetime  # when the files were read
    certificate: Certificate | AccessError  # beside the key, valid or not; or why there is none
    # What the credentials file holds; empty where there is no such file, or where it must not be used
    stored: Credentials
    file_exists: bool  # whether there is a credentials file
    file_problem: str  # why the credentials file must not be used; empty if it may, or if there is none
    failing: Mapping[Part, Failing]

    @property
    def valid_certificate(self) -> Certificate | None:
        """The certificate, if servers accept it now."""
        found = self.certificate
        return found if isinstance(found, Certificate) and not found.validity_problem(self.now) else None

    @property
    def certificate_due(self) -> bool:
        """Whether a new certificate is needed, now or soon."""
        found = self.valid_certificate
        return found is None or self.now >= found.renew_at(self.settings.step_refresh_skew)

    @property
    def stored_problem(self) -> str:
        """What the credentials file lacks to be current; empty if it lacks nothing."""
        if self.file_problem:
            return self.file_problem
        if not self.file_exists:
            return f"{self.settings.credentials_file} does not exist"
        problems = []
        for name, secret in (("API token", self.stored.api_token), ("app password", self.stored.app_password)):
            if secret is None:
                problems.append(f"it has no {name}")
            elif secret.expires and secret.expired(self.now):
                problems.append(f"its {name} expired at {clock.written(secret.expires)}")
        return f"{self.settings.credentials_file}: {' and '.join(problems)}" if problems else ""

    @property
    def missing_settings(self) -> list[str]:
        """Variables without which no certificate can be requested."""
        needed = ("oidc_client_id", "oidc_username", "oidc_token_url", "step_ca_url", "step_fingerprint")
        return [f"ASC_{name.upper()}" for name in needed if getattr(self.settings, name) is None]

    @property
    def no_asc_settings(self) -> bool:
        """Whether no ASC_ variable is set: the only access is the key, or a certificate that a person requested."""
        return not any(name.startswith(("oidc_", "authentik_", "step_")) for name in self.settings.model_fields_set)

    @property
    def plain_key(self) -> bool:
        """Whether the site accepts plain keys: there is a key without a certificate, and no ASC_ variable is set."""
        return self.no_asc_settings and self.key.is_file() and not certificate_path(self.key).exists()

    @property
    def rotatable(self) -> bool:
        """Whether the secrets can be replaced, as far as the files tell."""
        token = self.stored.api_token
        usable = self.settings.authentik_api_token or (token is not None and not token.expired(self.now))
        return bool(usable and not self._rotation_problem)

    @property
    def renewable(self) -> bool:
        """Whether a certificate can be requested, as far as the files tell."""
        password = self.stored.app_password
        usable = self.settings.oidc_app_password or (password is not None and not password.expired(self.now))
        return self.rotatable or bool(usable and not self.missing_settings)

    def pausing(self, part: Part) -> bool:
        """Return whether a part is in the pause after a failure, and is retried on request only."""
        return part in self.failing and self.now < self.failing[part].pause_ends

    @property
    def _rotation_problem(self) -> str:
        base = [] if self.settings.authentik_api_base else ["ASC_AUTHENTIK_API_BASE"]
        missing = [*self.missing_settings, *base]
        return f"{', '.join(missing)} not set" if missing else self.file_problem

    @property
    def _make_token(self) -> str:
        return f"make an API token with {API_BUTTON} {self._page}; then run this, and paste it:"

    @property
    def _page(self) -> str:
        base = self.settings.authentik_api_base or "https://<ASC_AUTHENTIK_API_BASE>"
        return f"at {base.rstrip('/')}/if/user/#/settings, Tokens and App passwords"

    def explain_rotation(self, refusals: Mapping[Source, str]) -> RejectedError:
        """Return why the stored secrets cannot be replaced, and the command that makes new ones.

        `refusals`: what authentik has said, by `stored` and `bootstrap`.
        """
        stored = f"the API token in {self.settings.credentials_file}: {refusals.get('stored')}"
        token = refusals.get("bootstrap") or ("set" if self.settings.authentik_api_token else "not set")
        reasons = (
            stored if "stored" in refusals else self.stored_problem,
            f"ASC_AUTHENTIK_API_TOKEN: {token}",
            "" if self._rotation_problem == self.stored_problem else self._rotation_problem,
        )
        what = "The stored secrets cannot be replaced" if self.file_exists else "No secrets can be made"
        return RejectedError(
            f"{what}: {'; '.join(filter(None, reasons))}. To make new ones, {self._make_token}\n  {_ASK_FOR_TOKEN}"
        )

    def explain(self, refusals: Mapping[Source, str]) -> BootstrapError:
        """Return the ways, why none is open, and what opens each; without the first if a certificate is valid.

        `refusals`: what servers have said, by `stored`, `bootstrap` and `direct`.
        """
        valid, enough = self.valid_certificate, "One of these is enough, and none of them works:"
        head = (
            f"The certificate works until {clock.written(valid.valid_before)}, but is not renewed. {enough}"
            if valid
            else f"No access to {self.settings.edge_node_host}. {enough}"
        )
        lines = [head]
        ways = self._ways(refusals)[1 if valid else 0 :]
        for number, (name, status, advice, command) in enumerate(ways, 1):
            found = (status or "present, but the server rejected it").replace("\n", "\n     ")
            lines += [f"  {number}. {name}", f"     status: {found}"]
            lines += [f"     to do: {advice}", *([f"       {command}"] if command else [])]
        if self.no_asc_settings:
            lines.append(
                "A site whose certificates renew themselves needs the ASC_ variables (scripts/docs credentials)"
            )
        elif self.missing_settings:
            names = ", ".join(self.missing_settings)
            they = "They" if valid else "All but a certificate"
            lines.append(f"{they} also need settings that are not set: {names} (scripts/docs settings)")
        return BootstrapError("\n".join(lines))

    def _ways(self, refusals: Mapping[Source, str]) -> list[tuple[str, str, str, str]]:
        """Return each way: its name and variable, why it is closed (empty if unknown), what opens it, the command.

        Without ASC_ variables these are the two that need only the key.
        """
        settings, key, certificate = self.settings, self.key, self.certificate
        name = shlex.quote(str(key))
        missing = f"{', '.join(self.missing_settings)} not set" if self.missing_settings else ""
        once = "not set; it is needed only once: from then on, Dagster makes its own"
        invalid = str(certificate) if isinstance(certificate, AccessError) else certificate.validity_problem(self.now)
        ways = [
            (
                f"a valid certificate beside the key: SLURM_EDGE_NODE_KEY_PATH={key}",
                invalid,
                "log in with a browser (the first time, `step ca bootstrap` comes before: scripts/docs credentials):",
                f"step ssh certificate 'your.email@example.com' {name} --no-password --insecure --force",
            ),
            (
                f"stored credentials: ASC_AUTHENTIK_CREDENTIALS_FILE={settings.credentials_file}",
                refusals.get("stored") or self.stored_problem or missing,
                "do what the status says" if self.file_problem else "set up the API token: that writes this file",
                "",
            ),
            (
                "an API token: ASC_AUTHENTIK_API_TOKEN",
                refusals.get("bootstrap") or ("" if settings.authentik_api_token else once) or self._rotation_problem,
                self._make_token,
                _ASK_FOR_TOKEN,
            ),
            (
                "an app password: ASC_OIDC_APP_PASSWORD",
                refusals.get("direct") or ("" if settings.oidc_app_password else "not set") or missing,
                f"make one with {APP_BUTTON} {self._page}; then run this, and paste it:",
                _ASK_FOR_PASSWORD,
            ),
        ]
        if self.no_asc_settings:
            plain = f"a plain key, where the site accepts one: SLURM_EDGE_NODE_KEY_PATH={key}"
            if key.is_file():
                beside = certificate_path(key)
                status, advice = f"the key has a certificate, {beside}", "to use the key alone, remove it:"
                command = f"rm {shlex.quote(str(beside))}"
            else:
                status, advice = f"{key} does not exist", f"make one, and give the site {key.name}.pub:"
                command = f"ssh-keygen -t ed25519 -N '' -f {name}"
            return [ways[0], (plain, status, advice, command)]
        return ways


def read_access(settings: Settings) -> AccessState:
    """Read the files. No network, no lock."""
    key, file, problem = settings.edge_node_key_path, settings.credentials_file, ""
    assert key
    certificate: Certificate | AccessError
    try:
        certificate = read_certificate(key)
    except AccessError as error:
        certificate = error
    try:
        stored = Credentials.read(file)
        exists = stored is not None
    except UnsafeFileError as error:
        stored, exists, problem = None, True, str(error)
    if stored and stored.user not in ("", settings.oidc_username):
        problem = (
            f"{file} has the credentials of {stored.user!r}, not of ASC_OIDC_USERNAME={settings.oidc_username}: "
            "perhaps of another project of yours. Set ASC_AUTHENTIK_CREDENTIALS_FILE to another file, or correct "
            "ASC_OIDC_USERNAME"
        )
        stored = None
    failing = RefreshFailures(file).read()
    return AccessState(settings, key, clock.now(), certificate, stored or Credentials(), exists, problem, failing)
