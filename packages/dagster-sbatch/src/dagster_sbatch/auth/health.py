"""The state of the access: how long it lasts and what happens next; from files alone, in milliseconds."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from dagster_sbatch import clock
from dagster_sbatch.auth.keys import Certificate, certificate_path
from dagster_sbatch.auth.refresh_failures import Failing, Part
from dagster_sbatch.auth.ways import AccessState, read_access
from dagster_sbatch.settings import Settings

Verdict = Literal["ok", "due", "failing", "broken"]


@dataclass(frozen=True)
class HealthItem:
    """One thing that ends."""

    name: str  # `certificate`, `API token` or `app password`
    where: str  # its file, or the variable
    valid_until: datetime | None  # None if it is not there or its end is not known
    renew_at: datetime | None  # from when on it is made or replaced; None if it is not
    state: str  # in words


@dataclass(frozen=True)
class AccessHealth:
    """The state of the access."""

    now: datetime  # when the files were read
    # `ok`; `due`: a refresh is due; `failing`: a refresh fails, while access still works; `broken`: there is no access
    verdict: Verdict
    summary: str  # what is wrong and what to do; one sentence where nothing is
    items: tuple[HealthItem, ...]  # the certificate and both secrets
    next_refresh: datetime | None  # when something is to be done next; None if nothing renews itself
    failing: Mapping[Part, Failing]  # the parts whose last refresh failed
    notes: tuple[str, ...]  # what people should know besides

    def remaining(self, item: HealthItem) -> timedelta | None:
        """Return how long an item lasts; negative after its end."""
        return None if item.valid_until is None else item.valid_until - self.now


def check_health(settings: Settings) -> AccessHealth:
    """Return the state of the access, from the files alone."""
    if settings.on_login_node:
        return AccessHealth(clock.now(), "ok", "Dagster runs on the login node: no login needed", (), None, {}, ())
    access = read_access(settings)
    next_refresh = _next_refresh(access)
    verdict, summary = _judge(access, next_refresh)
    certificate = access.valid_certificate
    end_is_known = access.rotatable or (verdict == "failing" and not access.renewable)  # the summary has it
    notes = (
        "" if end_is_known else _not_self_renewing(access),
        certificate.principals_problem(settings) if certificate else "",
    )
    shown = tuple(note for note in notes if note and note != summary)
    return AccessHealth(access.now, verdict, summary, _items(access), next_refresh, access.failing, shown)


def _next_refresh(access: AccessState) -> datetime | None:
    """Return when the first part is to be refreshed next; None if there is none that can be."""
    settings, certificate = access.settings, access.valid_certificate
    due: dict[Part, datetime] = {}
    if certificate is None and not access.no_asc_settings:
        due["certificate"] = access.now
    elif certificate is not None and access.renewable:
        due["certificate"] = certificate.renew_at(settings.step_refresh_skew)
    if access.rotatable:  # one that has failed is due until it succeeds
        due["rotation"] = (
            access.now
            if "rotation" in access.failing
            else access.stored.renew_at(settings.authentik_refresh_skew_days, access.now)
        )
    pauses = {part: found.pause_ends for part, found in access.failing.items()}
    return min((max(moment, pauses.get(part, moment)) for part, moment in due.items()), default=None)


def _judge(access: AccessState, next_refresh: datetime | None) -> tuple[Verdict, str]:
    problem, certificate = _problem(access), access.valid_certificate
    if problem and certificate:
        return "failing", f"{problem}\nAccess works until {clock.written(certificate.valid_before)}"
    if problem and access.renewable and "certificate" not in access.failing:
        return "failing", f"{problem}\nNevertheless, a certificate can be requested"
    if problem:
        return "broken", problem
    if next_refresh is None:
        return "ok", _not_self_renewing(access) or f"a plain key, {access.key}: nothing expires"
    if next_refresh <= access.now:
        return "due", f"a refresh is due since {clock.written(next_refresh)}"
    wait = clock.duration((next_refresh - access.now).total_seconds())
    return "ok", f"next refresh at {clock.written(next_refresh)}, in {wait}"


def _problem(access: AccessState) -> str:
    """Return what is wrong; empty if nothing is."""
    if access.plain_key:
        return ""
    if access.renewable:
        names: dict[Part, str] = {"certificate": "the certificate", "rotation": "the stored secrets"}
        text = ""
        for part, found in sorted(access.failing.items()):
            tried = "once" if found.count == 1 else f"{found.count} times"
            *_, advice = found.error.split("\n")
            error = "see above" if advice in text else found.error
            text += (
                f"\n{names[part]} could not be renewed since {clock.written(found.since)} "
                f"(tried {tried}, last at {clock.written(found.last)}): {error}"
            )
        return text.lstrip()
    if access.valid_certificate is None:
        return str(access.explain({}))
    if access.file_exists:
        return f"nothing can be renewed: {access.stored_problem}"
    return ""  # a certificate that a person requested, and nothing else


def _not_self_renewing(access: AccessState) -> str:
    """Return when access ends if no person acts, where nothing can replace the secrets."""
    certificate, password = access.valid_certificate, access.stored.app_password
    if access.plain_key:
        return ""
    if access.renewable and access.settings.oidc_app_password:
        end = "when the app password in ASC_OIDC_APP_PASSWORD expires; only authentik knows when"
    elif access.renewable and password and password.expires:
        end = f"at {clock.written(password.expires)}, when the stored app password expires"
    elif certificate:
        end = f"at {clock.written(certificate.valid_before)}, when the certificate expires"
    else:
        return ""
    return f"nothing renews access: it ends {end}"


def _items(access: AccessState) -> tuple[HealthItem, ...]:
    """Return the certificate and both secrets; for a secret that is not stored, the variable that holds one."""
    settings, stored, found, now = access.settings, access.stored, access.certificate, access.now
    missing = "not used" if access.plain_key else "missing"
    state, until, renew = missing, None, now if access.renewable else None
    if isinstance(found, Certificate):
        state = "not yet valid" if now < found.valid_after else "expired" if now >= found.valid_before else "valid"
        until, renew = found.valid_before, found.renew_at(settings.step_refresh_skew) if access.renewable else None
    items = [HealthItem("certificate", str(certificate_path(access.key)), until, renew, state)]
    for name, secret, variable, direct in (
        ("API token", stored.api_token, "ASC_AUTHENTIK_API_TOKEN", settings.authentik_api_token),
        ("app password", stored.app_password, "ASC_OIDC_APP_PASSWORD", settings.oidc_app_password),
    ):
        where, until, renew = str(settings.credentials_file), None, now
        if secret:
            until, renew = secret.expires, secret.renew_at(settings.authentik_refresh_skew_days) or now
            state = "expired" if secret.expired(now) else "valid" if secret.expires else "end not known"
        elif direct:
            where, state = variable, "end not known"
        else:
            state = "not usable" if access.file_problem else missing
        items.append(HealthItem(name, where, until, renew if access.rotatable else None, state))
    return tuple(items)
