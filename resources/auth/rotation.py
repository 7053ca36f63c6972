"""Replacing both stored secrets, so that a kill at any moment leaves a file with a pair that works.

The order of the steps is the safety: names are noted before tokens are made, the new pair is in the file before it is
tried, the old one leaves the file only after the new one has worked, and is deleted last.
"""

import secrets
from dataclasses import dataclass, replace

from resources.auth import clock
from resources.auth.authentik import Authentik, Intent, request_oidc_token
from resources.auth.credentials import Credentials, CredentialsFile, Secret, Source
from resources.auth.errors import AccessError, MisconfiguredError, RefusedError
from resources.auth.http import Http
from resources.settings import Settings


@dataclass(frozen=True)
class Rotation:
    """What a rotation did.

    Attributes:
        credentials: the new pair.
        used: which API token made it.
        warnings: tokens that could not be deleted yet, and the like.
    """

    credentials: Credentials
    used: Source
    warnings: tuple[str, ...] = ()


class NoTokenError(RefusedError):
    """No API token works.

    Attributes:
        refusals: of each that was tried, why.
    """

    def __init__(self, refusals: dict[Source, str]) -> None:
        super().__init__("; ".join(refusals.values()) or "there is no API token")
        self.refusals = refusals


class Rotator:
    """Rotates the credentials in one file; its owner holds the lock."""

    def __init__(self, settings: Settings, file: CredentialsFile, http: Http) -> None:
        """Needs the settings of authentik and OIDC."""
        self._settings = settings
        self._file = file
        self._http = http

    def settle(self, stored: Credentials) -> Credentials:
        """End a rotation that was cut short: keep the new pair if it works, else the one before.

        Raises:
            UnavailableError: it cannot be told now; the file keeps both.
        """
        if stored.proven:
            return stored
        try:
            self._prove(stored)
            settled = stored.without_previous()
        except RefusedError:
            settled = replace(
                stored.without_previous(),
                api_token=stored.previous_api_token,
                app_password=stored.previous_app_password,
            )
        self._file.write(settled)
        return settled

    def rotate(self, stored: Credentials) -> Rotation:
        """Make a new pair, keep it, try it, then delete the old one and what earlier crashes have left.

        Args:
            stored: what the file holds; settled.

        Raises:
            NoTokenError: no API token works; the text says of each why.
            UnavailableError: authentik is away; the file holds a pair that works, if it did before.
            MisconfiguredError: see the text.
        """
        authentik, used = self._choose(stored)
        names: dict[Intent, str] = {intent: self._new_name(intent) for intent in ("api", "app_password")}
        known = [each.identifier for each in (stored.api_token, stored.app_password) if each and each.identifier]
        record = tuple(dict.fromkeys([*stored.record, *known, *names.values()]))
        self._file.write(replace(stored, record=record))
        made = clock.now()
        expiries = {intent: authentik.create(name, intent) for intent, name in names.items()}
        pair = {
            intent: Secret(authentik.view_key(name), name, expiries[intent], made) for intent, name in names.items()
        }
        unproven = replace(
            stored,
            api_token=pair["api"],
            app_password=pair["app_password"],
            previous_api_token=stored.api_token,
            previous_app_password=stored.app_password,
            record=record,
        )
        self._file.write(unproven)
        try:
            self._prove(unproven)
        except RefusedError as error:
            self._file.write(replace(stored, record=record))
            raise MisconfiguredError(f"a token that authentik has just made does not work: {error}") from None
        proven = unproven.without_previous()
        self._file.write(proven)
        cleaned, warnings = self.clean(proven)
        return Rotation(cleaned, used, tuple(warnings))

    def _choose(self, stored: Credentials) -> tuple[Authentik, Source]:
        """The API token to work with: the stored one, else the one for bootstrap."""
        bootstrap = self._settings.authentik_api_token
        candidates: list[tuple[str, Source, str]] = []
        if stored.api_token:
            candidates.append((f"the API token in {self._file.path}", "stored", stored.api_token.value))
        if bootstrap:
            candidates.append(("ASC_AUTHENTIK_API_TOKEN", "bootstrap", bootstrap.get_secret_value()))
        refusals: dict[Source, str] = {}
        for name, source, value in candidates:
            authentik = self._authentik(value)
            try:
                user = authentik.user()
            except RefusedError as error:
                refusals[source] = f"{name}: {self._why_refused(value, error)}"
                continue
            if user != self._settings.oidc_username:
                raise MisconfiguredError(
                    f"{name} belongs to {user!r}, not to ASC_OIDC_USERNAME={self._settings.oidc_username}"
                )
            return authentik, source
        raise NoTokenError(refusals)

    def _why_refused(self, value: str, error: RefusedError) -> str:
        """An app password is refused like any wrong token; only trying it as one tells."""
        try:
            request_oidc_token(self._settings, value, self._http)
        except RefusedError:
            return str(error)
        return (
            "refused, since it is an App Password. An API token is needed: in authentik, Settings -> Tokens and App "
            "passwords, take 'Create Token' (New Token), not 'Create App password' (New App Password)"
        )

    def _prove(self, credentials: Credentials) -> None:
        """Raise RefusedError unless both secrets work."""
        if credentials.api_token is None or credentials.app_password is None:
            raise RefusedError("the pair is incomplete")
        self._authentik(credentials.api_token.value).user()
        request_oidc_token(self._settings, credentials.app_password.value, self._http)

    def clean(self, current: Credentials) -> tuple[Credentials, list[str]]:
        """Delete at authentik what was made here and is not in use; what cannot be deleted now stays in the record.

        Only tokens that are in our own record and have our prefix are touched.

        Args:
            current: what the file holds; proven.

        Returns:
            What the file holds now, and a warning for each token that is left.
        """
        secrets_in_use = [each for each in (current.api_token, current.app_password) if each]
        in_use = [each.identifier for each in secrets_in_use if each.identifier]
        old = [name for name in current.record if name not in in_use and name.startswith(f"{self._prefix}-")]
        if not current.api_token or not old:
            return current, []
        authentik = self._authentik(current.api_token.value)
        left, warnings = [], []
        for name in old:
            try:
                authentik.delete(name)
            except AccessError as error:
                left.append(name)
                warnings.append(f"the old token {name} could not be deleted yet: {error}")
        cleaned = replace(current, record=tuple([name for name in current.record if name in in_use] + left))
        self._file.write(cleaned)
        return cleaned, warnings

    def _authentik(self, api_token: str) -> Authentik:
        return Authentik(self._settings.authentik_api_base or "", api_token, self._http)

    @property
    def _prefix(self) -> str:
        return self._settings.authentik_token_identifier

    def _new_name(self, intent: Intent) -> str:
        """Random, since two processes on two machines may make one in the same second."""
        return f"{self._prefix}-{'api' if intent == 'api' else 'app'}-{secrets.token_hex(8)}"
