"""The one refresh that joins the parts: secrets at authentik, an OIDC token, a certificate from the CA.

`ensure_certificate` is called before each connect. `refresh` is the same with a wish and a report, for the job and
the script. Both take the same lock, look again once they have it, and keep what works when something fails.
"""

import logging
import random
import time
from dataclasses import dataclass, field
from typing import Literal

from resources.auth import clock
from resources.auth.attempts import Attempts, Part
from resources.auth.authentik import OidcToken, request_oidc_token
from resources.auth.certificate import (
    Certificate,
    certificate_path,
    ensure_key,
    public_path,
    write_certificate,
)
from resources.auth.credentials import CredentialsFile, Source
from resources.auth.errors import AccessError, ClockError, MisconfiguredError, RefusedError, UnavailableError
from resources.auth.files import remove_half_written
from resources.auth.http import Http
from resources.auth.issuer import issuer
from resources.auth.lock import refresh_lock
from resources.auth.rotation import NoTokenError, Rotator
from resources.auth.ways import Access, explain, explain_rotation, look, plain_key
from resources.settings import Settings

Wish = Literal["due", "now", "no"]
"""Do a part if it is due, in any case, or not at all."""

LOCK_SECONDS = 150.0
"""Longer than a refresh can take: all calls 60 s (`http.BUDGET_SECONDS`), the last one a little more, `step` 30 s."""
LOCK_SECONDS_WITH_CERTIFICATE = 5.0
ISSUE_TRIES = 3

_log = logging.getLogger(__name__)


@dataclass
class Report:
    """What a refresh did.

    Attributes:
        certificate: the one that is good now; None on sites that take plain keys, or if none was wished for.
        rotated_with: which API token replaced the two secrets; None if they were not replaced.
        issued_with: which app password the certificate was got with; None if there is no new one.
        warnings: what failed without harm so far.
    """

    certificate: Certificate | None = None
    rotated_with: Source | None = None
    issued_with: Source | None = None
    warnings: list[str] = field(default_factory=list)


def ensure_certificate(settings: Settings) -> Certificate | None:
    """Return a certificate that is good to connect with, renewing it first if that is due.

    With a good one this only reads files. A renewal that fails is a warning as long as the certificate is valid, and
    is not tried again for a minute or more.

    Returns:
        The certificate; None where plain keys are used: no certificate, and no ASC_ variable is set.

    Raises:
        BootstrapError: there is no way to get one; told from files alone, before any network.
        AccessError: it could not be had now; `temporary` tells whether trying again may help.
    """
    access = look(settings)
    certificate = access.valid_certificate
    if certificate is None:
        if plain_key(access):
            return None
    elif (
        access.now < certificate.renew_at(settings.step_refresh_skew)
        or not access.renewable
        or _pausing(Attempts(settings.credentials_file), "certificate", access)
    ):
        return certificate
    report = refresh(settings)
    for warning in report.warnings:
        _log.warning("%s", warning)
    return report.certificate


def refresh(settings: Settings, rotation: Wish = "due", certificate: Wish = "due") -> Report:
    """Replace the secrets and the certificate as wished, one process at a time.

    Raises:
        BootstrapError: there is nothing to get a certificate with, and none is valid, or one was asked for `now`.
        AccessError: a part that was asked for `now` failed, or there is no valid certificate and none was to be had.
    """
    access = look(settings)
    patient = access.valid_certificate is None or "now" in (rotation, certificate)
    if plain_key(access):
        if rotation == "now":
            key = settings.edge_node_key_path
            raise MisconfiguredError(f"{key} is a plain key and no ASC_ variable is set: there are no secrets")
        return Report()
    if not access.renewable and (access.valid_certificate is None or certificate == "now"):
        raise explain(access, {})
    try:
        with refresh_lock(settings.credentials_file, LOCK_SECONDS if patient else LOCK_SECONDS_WITH_CERTIFICATE):
            return _Refresh(settings).run(rotation, certificate)
    except AccessError as error:  # the lock: all that comes after it keeps what works by itself
        if patient:
            raise
        return Report(access.valid_certificate, warnings=[f"{error}. The certificate is still valid"])


class _Refresh:
    """One refresh, by the holder of the lock."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._access = look(settings)  # again: another process may have done it meanwhile
        self._http = Http()
        self._file = CredentialsFile(settings.credentials_file)
        self._rotator = Rotator(settings, self._file, self._http)
        self._attempts = Attempts(settings.credentials_file)
        self._report = Report()
        self._refusals: dict[Source, str] = {}

    def run(self, rotation: Wish, certificate: Wish) -> Report:
        """Do what is wished; raises as `refresh` does."""
        key = self._settings.edge_node_key_path
        assert key
        for path in (self._file.path, key, public_path(key), certificate_path(key)):
            remove_half_written(path)
        if rotation != "no":
            self._rotate_or_warn(rotation)
        if certificate == "no":
            return self._report
        self._report.certificate = self._access.valid_certificate
        if certificate == "now" or self._certificate_due():
            self._issue_or_warn(forced=certificate == "now")
        self._check_principals()
        return self._report

    def _rotate_or_warn(self, rotation: Wish) -> None:
        """Replace the secrets; while a certificate or an app password works, a failure is but a warning."""
        access = self._access
        if not access.rotatable:
            if rotation == "now":
                raise explain_rotation(access)
            return
        pausing = access.renewable and _pausing(self._attempts, "rotation", access)
        if pausing and rotation != "now":
            return
        try:
            self._rotate(forced=rotation == "now")
        except AccessError as error:
            self._attempts.failed("rotation", error)
            if isinstance(error, NoTokenError):
                self._refusals |= error.refusals
            if rotation == "now":
                raise
            self._report.warnings.append(f"the secrets could not be replaced: {error}")
        else:
            self._attempts.succeeded("rotation")
        self._access = look(self._settings)

    def _rotate(self, forced: bool) -> None:
        stored = self._rotator.settle(self._access.stored)
        if forced or stored.renew_at(self._settings.authentik_refresh_skew_days, clock.now()) <= clock.now():
            done = self._rotator.rotate(stored)
            self._report.rotated_with = done.used
            self._report.warnings.extend(done.warnings)
        else:
            self._report.warnings.extend(self._rotator.clean(stored)[1])

    def _certificate_due(self) -> bool:
        certificate = self._access.valid_certificate
        return certificate is None or self._access.now >= certificate.renew_at(self._settings.step_refresh_skew)

    def _issue_or_warn(self, forced: bool) -> None:
        valid = self._access.valid_certificate
        try:
            self._report.certificate = self._issue()
        except AccessError as error:
            self._attempts.failed("certificate", error)
            if valid is None or forced:
                raise
            until = clock.written(valid.valid_before)
            self._report.warnings.append(f"the certificate, valid until {until}, could not be renewed: {error}")
        else:
            self._attempts.succeeded("certificate")

    def _issue(self) -> Certificate:
        """Ask for a certificate, each time with a fresh token: one works once, also when the CA fails."""
        assert self._settings.edge_node_key_path
        key = self._settings.edge_node_key_path
        public = ensure_key(key)
        for left in reversed(range(ISSUE_TRIES)):
            token, source = self._oidc_token()
            try:
                line = issuer(self._settings)(self._settings, self._http, public, token)
            except (UnavailableError, RefusedError):
                if not left or self._http.remaining() <= 0:
                    raise
                time.sleep(random.uniform(0.2, 1.0) * (ISSUE_TRIES - left))  # noqa: S311 (jitter)
                continue
            break
        certificate = write_certificate(key, line)
        self._report.issued_with = source
        _check_own_clock(certificate)
        return certificate

    def _oidc_token(self) -> tuple[OidcToken, Source]:
        """By the stored app password, else the direct one; if the stored one is refused, by a new one."""
        found = self._try_app_passwords()
        if found is None and self._report.rotated_with is None and self._access.rotatable:
            self._rotate_or_warn_once()
            found = self._try_app_passwords()
        if found is None:
            raise explain(self._access, self._refusals)
        return found

    def _rotate_or_warn_once(self) -> None:
        try:
            self._rotate(forced=True)
        except NoTokenError as error:
            self._refusals |= error.refusals
        self._access = look(self._settings)

    def _try_app_passwords(self) -> tuple[OidcToken, Source] | None:
        direct, stored = self._settings.oidc_app_password, self._access.stored
        candidates: list[tuple[str, Source, str]] = [
            (f"the app password in {self._file.path}", "stored", secret.value)
            for secret in (stored.app_password, stored.previous_app_password)
            if secret
        ]
        if direct:
            candidates.append(("ASC_OIDC_APP_PASSWORD", "direct", direct.get_secret_value()))
        for name, source, value in candidates:
            try:
                return request_oidc_token(self._settings, value, self._http), source
            except RefusedError as error:
                self._refusals[source] = f"{name}: {error}"
        return None

    def _check_principals(self) -> None:
        warning = principals_problem(self._report.certificate, self._settings)
        if warning:
            self._report.warnings.append(warning)


def principals_problem(certificate: Certificate | None, settings: Settings) -> str:
    """What to say of a certificate that does not carry the login name; empty if there is nothing to say."""
    if certificate is None or settings.edge_node_user in certificate.principals:
        return ""
    return (
        f"the certificate is for the login names {', '.join(certificate.principals) or '(none)'}, not for "
        f"SLURM_EDGE_NODE_USER={settings.edge_node_user}: the login node may refuse it"
    )


def _check_own_clock(certificate: Certificate) -> None:
    now = clock.now()
    if not certificate.valid(now):
        raise ClockError(
            f"the new certificate is valid from {clock.written(certificate.valid_after)} until "
            f"{clock.written(certificate.valid_before)}, but this machine has {clock.written(now)}: set its clock"
        )


def _pausing(attempts: Attempts, part: Part, access: Access) -> bool:
    """Whether a part has failed so lately that it is not tried again by itself."""
    failing = attempts.failing(part)
    return failing is not None and access.now < failing.pause_ends
