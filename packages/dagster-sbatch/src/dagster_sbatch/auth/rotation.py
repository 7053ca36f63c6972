"""Replace both stored secrets, so that a kill at any moment leaves a file with a pair that works.

The order of the steps guarantees that: names are recorded before their tokens are made, the new pair is tried before
it replaces the old one in the file, and the old one is deleted last. A rotation that fails deletes the tokens that it
has made; those that it cannot delete stay in the record, and the next refresh deletes them.
"""

import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from dagster_sbatch import clock
from dagster_sbatch.auth.access_errors import AccessError, RejectedError, UnavailableError
from dagster_sbatch.auth.authentik import API_BUTTON, APP_BUTTON, Authentik, Intent, request_oidc_token
from dagster_sbatch.auth.credentials_file import Credentials, Secret, Source, candidates
from dagster_sbatch.auth.http import Http
from dagster_sbatch.settings import Settings

LATE_REQUEST = timedelta(hours=1)
"""How long a request for a token may still arrive after its client has died: a proxy may delay it."""
MOST_LEFT = 4  # with this many tokens that could not be deleted, no more are made
_TIME = "%Y%m%d%H%M%S"


class NoTokenError(RejectedError):
    """No API token works; `refusals`: the reason for each token that was tried."""

    def __init__(self, refusals: Mapping[Source, str]) -> None:
        super().__init__("; ".join(refusals.values()) or "there is no API token")
        self.refusals = refusals


class Rotator:
    """Rotates the credentials in one file; its caller holds the lock."""

    def __init__(self, settings: Settings, http: Http) -> None:
        """`settings`: with those of authentik and OIDC."""
        self._settings, self._prefix = settings, settings.authentik_token_identifier
        self._path = settings.credentials_file
        self._http = http

    def check(self, stored: Credentials) -> None:
        """Ask authentik whether the stored API token still works, long before it is due; an outage is not a failure.

        Raises NoTokenError: it does not.
        """
        if stored.api_token is None:
            return
        try:
            with suppress(UnavailableError):
                self._authentik(stored.api_token.value).user(tries=1)
        except RejectedError as error:
            raise NoTokenError({"stored": self._explain_refusal(stored.api_token.value, error, "stored")}) from None

    def rotate(self, stored: Credentials) -> tuple[Source, list[str]]:
        """Make a new pair, try it, write it, then delete the old one and what earlier failures have left.

        Returns which API token made the pair, and a warning for each token that could not be deleted.
        Raises NoTokenError: no API token works; the text says why, for each.
        Raises UnavailableError: authentik does not answer; the file holds a pair that works, if it did before.
        Raises AccessError: the new secrets do not work, or the file cannot hold them.
        """
        authentik, used = self._choose(stored)
        stored, failures = self._delete_unused(authentik, stored)
        if len(failures) >= MOST_LEFT:
            *_, last = failures.values()
            raise (UnavailableError if last.temporary else AccessError)(
                f"{len(failures)} tokens that were made before could not be deleted at authentik ({last}), so no more "
                f"are made. If that lasts, delete them there, in Tokens and App passwords: {', '.join(failures)}"
            )
        # With the time, and random, since two machines may make one in the same second.
        kinds: dict[Intent, str] = {"api": "api", "app_password": "app"}
        now = f"{clock.now():{_TIME}}"
        names = {intent: f"{self._prefix}-{kind}-{now}-{secrets.token_hex(8)}" for intent, kind in kinds.items()}
        known = [each.identifier for each in (stored.api_token, stored.app_password) if each and each.identifier]
        record = tuple(dict.fromkeys([*stored.record, *known, *names.values()]))
        stored = replace(stored, record=record)
        stored.write(self._path)
        try:
            api_token, app_password = self._make(authentik, names)
            self._prove(api_token, app_password)
            user = self._settings.oidc_username or ""
            new = replace(stored, api_token=api_token, app_password=app_password, user=user)
            new.write(self._path)
        except AccessError:
            if Credentials.read(self._path) == stored:  # else the file holds the new pair, although an error followed
                self._delete_unused(authentik, stored)
            raise
        return used, self.clean(new)

    def clean(self, current: Credentials) -> list[str]:
        """Delete the tokens made here that are not in use; those that cannot be deleted now stay in the record.

        Returns a warning for each token that could not be deleted.
        """
        if not current.api_token:
            return []
        _, failures = self._delete_unused(self._authentik(current.api_token.value), current)
        return [f"the old token {name} could not be deleted yet: {error}" for name, error in failures.items()]

    def _make(self, authentik: Authentik, names: Mapping[Intent, str]) -> tuple[Secret, Secret]:
        """Make both tokens; return the API token and the app password with their secrets."""
        made = clock.now()
        expiries = {intent: authentik.create(name, intent) for intent, name in names.items()}
        pair = {
            intent: Secret(authentik.view_key(name), name, expiries[intent], made) for intent, name in names.items()
        }
        return pair["api"], pair["app_password"]

    def _choose(self, stored: Credentials) -> tuple[Authentik, Source]:
        """Return an API token that works: the stored one, else ASC_AUTHENTIK_API_TOKEN."""
        refusals: dict[Source, str] = {}
        for source, value in candidates(stored.api_token, "bootstrap", self._settings.authentik_api_token).items():
            authentik = self._authentik(value)
            try:
                user = authentik.user()
            except RejectedError as error:
                refusals[source] = self._explain_refusal(value, error, source)
                continue
            if user != self._settings.oidc_username:
                name = f"The API token in {self._path}" if source == "stored" else "ASC_AUTHENTIK_API_TOKEN"
                raise AccessError(
                    f"{name} belongs to {user!r}, not to ASC_OIDC_USERNAME={self._settings.oidc_username}. "
                    "Correct ASC_OIDC_USERNAME, or use a token of that user, or set ASC_AUTHENTIK_CREDENTIALS_FILE to "
                    "another file if this one is another project's"
                )
            return authentik, source
        raise NoTokenError(refusals)

    def _explain_refusal(self, value: str, error: RejectedError, source: Source) -> str:
        """Return why authentik may have refused an API token; it refuses an app password in the same words."""
        try:
            request_oidc_token(self._settings, value, self._http)
        except AccessError:
            copy = f". Or {self._path} is a copy of another machine's file, and that machine has replaced the secrets"
            reason = f"{error}. It is wrong, expired or deleted, or its user is not active"
            return reason + (copy if source == "stored" else "")
        return (
            "it is an App Password, and an API token is needed: in authentik, Settings, Tokens and App passwords, use "
            f"{API_BUTTON}, not {APP_BUTTON}"
        )

    def _prove(self, api_token: Secret, app_password: Secret) -> None:
        """Use both new secrets; raises AccessError if one is refused."""
        try:
            self._authentik(api_token.value).user()
            request_oidc_token(self._settings, app_password.value, self._http)
        except RejectedError as error:
            raise AccessError(
                f"authentik refuses a secret that it has just made, which was deleted again: {error}. The user "
                f"{self._settings.oidc_username} is not allowed to use the application of ASC_OIDC_CLIENT_ID="
                f"{self._settings.oidc_client_id} (has the project ended?), or that application is missing, or the "
                "user is not active. Ask the centre"
            ) from None

    def _delete_unused(self, authentik: Authentik, current: Credentials) -> tuple[Credentials, dict[str, AccessError]]:
        """Delete the tokens in our record that bear our prefix and are not in use.

        A name stays in the record for LATE_REQUEST, to be deleted again: a request for it may yet arrive, since one
        that gets no answer in time is repeated.
        Returns what the file holds now, and the names that could not be deleted, each with the reason.
        """
        in_use = [each.identifier for each in (current.api_token, current.app_password) if each]
        old = [name for name in current.record if name not in in_use and name.startswith(f"{self._prefix}-")]
        kept: list[str] = []
        failures: dict[str, AccessError] = {}
        failure: AccessError | None = None
        for name in old:
            try:
                if failure is not None and (failure.temporary or isinstance(failure, RejectedError)):
                    raise failure  # the others would fail alike
                authentik.delete(name)
                if self._may_be_made_yet(name):
                    kept.append(name)
            except AccessError as error:
                failure = failures[name] = error
                kept.append(name)
        record = tuple([name for name in current.record if name in in_use] + kept)
        if record == current.record:
            return current, failures
        cleaned = replace(current, record=record)
        cleaned.write(self._path)
        return cleaned, failures

    def _authentik(self, api_token: str) -> Authentik:
        return Authentik(self._settings.authentik_api_base or "", api_token, self._http)

    def _may_be_made_yet(self, name: str) -> bool:
        try:
            made = datetime.strptime(name.removeprefix(f"{self._prefix}-").split("-")[1], _TIME).replace(tzinfo=UTC)
        except (IndexError, ValueError):
            return False  # a person has chosen it
        return abs(clock.now() - made) < LATE_REQUEST
