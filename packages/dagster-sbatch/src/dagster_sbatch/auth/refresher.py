"""One refresh: new secrets from authentik, an OIDC token, a certificate from the step CA. What works is kept."""

import random
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from dagster_sbatch import clock
from dagster_sbatch.atomic_write import remove_half_written
from dagster_sbatch.auth.access_errors import AccessError, RejectedError, UnavailableError
from dagster_sbatch.auth.authentik import APP_BUTTON, Authentik, OidcToken, request_oidc_token
from dagster_sbatch.auth.credentials_file import Source, candidates, explained
from dagster_sbatch.auth.http import Http
from dagster_sbatch.auth.issuer import issue_certificate
from dagster_sbatch.auth.keys import Certificate, certificate_path, ensure_key, public_path, write_certificate
from dagster_sbatch.auth.refresh_failures import Part, RefreshFailures
from dagster_sbatch.auth.rotation import NoTokenError, Rotator
from dagster_sbatch.auth.ways import read_access
from dagster_sbatch.settings import Settings

When = Literal["due", "now", "no"]  # do a part of the refresh if it is due, in any case, or not at all

ISSUE_TRIES = 3


@dataclass
class Report:
    """The outcome of a refresh."""

    # The valid one; None on sites that accept plain keys, or if none was asked for
    certificate: Certificate | None = None
    rotated_with: Source | None = None  # which API token replaced the two secrets; None if they were not replaced
    # Which app password the certificate was requested with; None if there is no new one
    issued_with: Source | None = None
    warnings: list[str] = field(default_factory=list)  # failures that have done no harm so far


class Refresher:
    """Makes one refresh, for the holder of the lock."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._access = read_access(settings)  # again: another process may have refreshed it meanwhile
        self._http = Http()
        self._rotator = Rotator(settings, self._http)
        self._failures = RefreshFailures(settings.credentials_file)
        self._report = Report()
        self._refusals: dict[Source, list[str]] = {}
        self._rotation_failure: AccessError | None = None

    def run(self, rotation: When, certificate: When, refused: Certificate | None, called: datetime | None) -> Report:
        """Do what is asked for; arguments and errors are those of `refresh`.

        `called`: when a patient caller began to wait for the lock; None for another one.
        """
        key = self._access.key
        for path in (self._settings.credentials_file, key, public_path(key), certificate_path(key)):
            remove_half_written(path)
        if rotation == "now" and not self._access.rotatable:
            raise self._access.explain_rotation({})
        if rotation == "now" or (rotation == "due" and self._access.rotatable and not self._access.pausing("rotation")):
            self._attempt("rotation", forced=rotation == "now", needed=rotation == "now")
        if certificate == "no":
            return self._report
        found = self._report.certificate = self._access.valid_certificate
        needed = certificate == "now" or found in (None, refused)
        if needed or self._access.certificate_due:
            failing = None if self._report.rotated_with else self._access.failing.get("certificate")
            if called and needed and failing and failing.counts_for(called, self._access.now):
                raise failing.again()
            self._attempt("certificate", forced=certificate == "now", needed=needed)
        found = self._report.certificate
        if found and (warning := found.principals_problem(self._settings)):
            self._report.warnings.append(warning)
        return self._report

    def _attempt(self, part: Part, *, forced: bool, needed: bool) -> None:
        """Refresh a part; a failure is a warning unless the part is needed now."""
        try:
            if part == "rotation":
                self._rotate(forced=forced)
            else:
                self._issue(forced=forced)
        except AccessError as error:
            if needed:
                raise
            name = "the secrets" if part == "rotation" else "the certificate"
            self._report.warnings.append(f"{name} could not be replaced: {error}")

    def _rotate(self, *, forced: bool) -> None:
        """Replace the secrets if they are due or a rotation has failed, and record the outcome."""
        try:
            with explained():
                self._rotate_if_due(forced=forced)
        except NoTokenError as error:
            for source, why in error.refusals.items():
                self._refuse(source, f"API token: {why}" if source == "stored" else why)
            self._rotation_failure = self._access.explain_rotation(error.refusals)
        except RejectedError as error:
            self._rotation_failure = self._access.explain_rotation({"stored": str(error)})
        except AccessError as error:
            self._rotation_failure = error
        if self._rotation_failure is None:
            self._failures.clear("rotation")
        else:
            self._failures.add("rotation", self._rotation_failure)
        self._access = read_access(self._settings)
        if self._rotation_failure is not None:
            raise self._rotation_failure

    def _rotate_if_due(self, *, forced: bool) -> None:
        stored, skew, now = self._access.stored, self._settings.authentik_refresh_skew_days, clock.now()
        if forced or "rotation" in self._access.failing or stored.renew_at(skew, now) <= now:
            self._report.rotated_with, warnings = self._rotator.rotate(stored)
            self._report.warnings.extend(warnings)
        else:
            self._report.warnings.extend(self._rotator.clean(stored))
            self._rotator.check(stored)

    def _issue(self, *, forced: bool) -> None:
        """Request a certificate, and record the outcome."""
        try:
            with explained():
                self._report.certificate = self._request_certificate(forced=forced)
        except AccessError as error:
            self._failures.add("certificate", error)
            raise
        self._failures.clear("certificate")

    def _request_certificate(self, *, forced: bool) -> Certificate:
        """Request a certificate, each time with a fresh token: the CA accepts each once, also when it fails then."""
        public = ensure_key(self._access.key)
        for left in reversed(range(ISSUE_TRIES)):
            token, source = self._oidc_token(forced=forced)
            try:
                line = issue_certificate(self._settings, self._http, public, token)
                break
            except (UnavailableError, RejectedError):
                if not left or self._http.remaining() <= 0:
                    raise
                time.sleep(random.uniform(0.2, 1.0) * (ISSUE_TRIES - left))  # noqa: S311 (jitter)
        certificate = write_certificate(self._access.key, line)
        self._report.issued_with = source
        certificate.check_own_clock()
        return certificate

    def _oidc_token(self, *, forced: bool) -> tuple[OidcToken, Source]:
        """Request a token with the stored app password, else with the direct one, else with a new one."""
        found = self._try_app_passwords()
        if found is None and self._report.rotated_with is None and self._access.rotatable:
            self._replace_refused(forced=forced)
            found = self._try_app_passwords()
        if found is None:
            raise self._access.explain({source: "; ".join(reasons) for source, reasons in self._refusals.items()})
        return found

    def _replace_refused(self, *, forced: bool) -> None:
        """Replace the pair, since no app password works: once, and not while an earlier failure pauses.

        Raises AccessError: the replacement failed, now or lately, for another reason than refused secrets.
        """
        failing = self._access.failing.get("rotation")
        failure = self._rotation_failure
        if failure is None and failing and not forced and self._access.pausing("rotation"):
            failure = failing.again()
        if failure is None:
            try:
                self._rotate(forced=True)
                return
            except AccessError as error:
                failure = error
        if failure.temporary or not self._refusals:
            raise failure
        if failure is not self._rotation_failure or not isinstance(failure, RejectedError):  # else they include it
            self._refuse("stored", f"new ones cannot be made: {str(failure).splitlines()[0]}")

    def _refuse(self, source: Source, why: str) -> None:
        reasons = self._refusals.setdefault(source, [])
        if why not in reasons:
            reasons.append(why)

    def _try_app_passwords(self) -> tuple[OidcToken, Source] | None:
        stored, direct = self._access.stored.app_password, self._settings.oidc_app_password
        for source, value in candidates(stored, "direct", direct).items():
            try:
                return request_oidc_token(self._settings, value, self._http), source
            except RejectedError as error:
                why = self._why_refused(source, value, error)
                self._refuse(source, f"app password: {why}" if source == "stored" else why)
        return None

    def _why_refused(self, source: Source, value: str, error: RejectedError) -> str:
        """Return why authentik may have refused an app password; it refuses an API token in the same words."""
        if source == "direct" and self._settings.authentik_api_base:
            with suppress(AccessError):
                Authentik(self._settings.authentik_api_base, value, self._http).user(tries=1)
                return (
                    "it is an API token, and an app password is needed: put it into ASC_AUTHENTIK_API_TOKEN instead, "
                    f"or make an app password with {APP_BUTTON}"
                )
        return (
            f"{error}. It is wrong, expired, deleted or of another user; or the user is not active, or not allowed to "
            f"use the application of ASC_OIDC_CLIENT_ID={self._settings.oidc_client_id} (has the project ended?)"
        )
