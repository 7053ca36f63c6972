"""The state of the access: what there is, how long it lasts, what happens next. From files alone, in milliseconds."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal

from pydantic import SecretStr

from resources.auth import clock
from resources.auth.attempts import Attempts, Failing, Part
from resources.auth.certificate import Certificate
from resources.auth.credentials import Secret
from resources.auth.ways import AccessState, explain, plain_key, read_access
from resources.settings import Settings

Verdict = Literal["ok", "due", "failing", "broken"]


@dataclass(frozen=True)
class Item:
    """One thing that ends.

    Attributes:
        name: `certificate`, `API token` or `app password`.
        where: its file, or the variable.
        valid_until: None if it is not there or its end is not known.
        renew_at: from when on it is made or replaced; None if it is not.
        state: in words.
    """

    name: str
    where: str
    valid_until: datetime | None
    renew_at: datetime | None
    state: str


@dataclass(frozen=True)
class Health:
    """The state of the access.

    Attributes:
        now: when the files were read.
        verdict: `ok`; `due`: a refresh is due; `failing`: a refresh fails, while access still works; `broken`: there
            is no access.
        summary: what is wrong and what to do; one sentence where nothing is.
        items: the certificate and both secrets.
        next_refresh: when something is to be done next; None if nothing renews itself.
        failing: the parts whose last refresh failed.
        notes: what people should know besides.
    """

    now: datetime
    verdict: Verdict
    summary: str
    items: tuple[Item, ...]
    next_refresh: datetime | None
    failing: dict[Part, Failing] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def remaining(self, item: Item) -> timedelta | None:
        """How long an item lasts; negative after its end."""
        return None if item.valid_until is None else item.valid_until - self.now


def check_health(settings: Settings) -> Health:
    """Return the state of the access, from the files alone."""
    access = read_access(settings)
    attempts = Attempts(settings.credentials_file)
    failing = {part: found for part in _PARTS if (found := attempts.failing(part))}
    items = (_certificate_item(access), *_secret_items(access))
    due = _due(access, failing)
    next_refresh = min(due.values(), default=None)
    verdict, summary = _judge(access, failing, next_refresh)
    notes = [] if access.rotatable else [_not_self_renewing(access)]
    principals = access.valid_certificate.principals_problem(settings) if access.valid_certificate else ""
    return Health(
        access.now,
        verdict,
        summary,
        items,
        next_refresh,
        failing,
        tuple(note for note in (*notes, principals) if note and note != summary),
    )


_PARTS: tuple[Part, ...] = ("certificate", "rotation")


def _due(access: AccessState, failing: dict[Part, Failing]) -> dict[Part, datetime]:
    """When each part is to be tried next; parts that cannot be done by themselves are left out."""
    settings = access.settings
    due: dict[Part, datetime] = {}
    certificate = access.valid_certificate
    if certificate is None and not access.key_alone:
        due["certificate"] = access.now
    elif certificate is not None and access.renewable:
        due["certificate"] = certificate.renew_at(settings.step_refresh_skew)
    if access.rotatable:
        due["rotation"] = access.stored.renew_at(settings.authentik_refresh_skew_days, access.now)
    if "rotation" in due and "rotation" in failing:
        due["rotation"] = access.now  # one that has failed is due until it succeeds
    pauses = {part: found.pause_ends for part, found in failing.items()}
    return {part: max(moment, pauses.get(part, moment)) for part, moment in due.items()}


def _judge(access: AccessState, failing: dict[Part, Failing], next_refresh: datetime | None) -> tuple[Verdict, str]:
    problem = _problem(access, failing)
    certificate = access.valid_certificate
    if problem and certificate:
        return "failing", f"{problem}\nAccess works until {clock.written(certificate.valid_before)}"
    if problem and access.renewable and "certificate" not in failing:
        return "failing", f"{problem}\nA certificate can be had all the same"
    if problem:
        return "broken", problem
    if next_refresh is None:
        return "ok", _not_self_renewing(access) or f"a plain key, {access.settings.edge_node_key_path}: nothing expires"
    if next_refresh <= access.now:
        return "due", f"a refresh is due since {clock.written(next_refresh)}"
    wait = clock.duration((next_refresh - access.now).total_seconds())
    return "ok", f"next refresh at {clock.written(next_refresh)}, in {wait}"


def _problem(access: AccessState, failing: dict[Part, Failing]) -> str:
    """What is wrong; empty if nothing is."""
    if access.renewable or plain_key(access):
        return _tell(failing)
    if access.valid_certificate is None:
        return str(explain(access, {}))
    if access.credentials is None:
        return ""  # a certificate by hand, and nothing else
    return f"nothing can be renewed: {access.stored_problem}"


def _tell(failing: dict[Part, Failing]) -> str:
    return "\n".join(
        f"{_NAMES[part]} could not be renewed since {clock.written(found.since)} "
        f"(tried {'once' if found.count == 1 else f'{found.count} times'}, last at {clock.written(found.last)}): "
        f"{found.error}"
        for part, found in failing.items()
    )


_NAMES: dict[Part, str] = {"certificate": "the certificate", "rotation": "the stored secrets"}


def _not_self_renewing(access: AccessState) -> str:
    """When access ends without a person, where nothing can replace the secrets."""
    certificate, password = access.valid_certificate, access.stored.app_password
    if plain_key(access):
        return ""
    if access.renewable and access.settings.oidc_app_password:
        end = "with the app password in ASC_OIDC_APP_PASSWORD, whose end only authentik knows"
    elif access.renewable and password and password.expires:
        end = f"at {clock.written(password.expires)}, with the stored app password"
    elif certificate:
        end = f"at {clock.written(certificate.valid_before)}, with the certificate"
    else:
        return ""
    return f"not self-renewing, ends {end}"


def _certificate_item(access: AccessState) -> Item:
    found, settings = access.certificate, access.settings
    where = str(settings.edge_node_key_path) + "-cert.pub"
    if not isinstance(found, Certificate):
        if plain_key(access):
            return Item("certificate", where, None, None, "not used")
        return Item("certificate", where, None, access.now if access.renewable else None, "missing")
    renew = found.renew_at(settings.step_refresh_skew) if access.renewable else None
    ended = "expired" if access.now >= found.valid_before else "valid"
    state = "not yet valid" if access.now < found.valid_after else ended
    return Item("certificate", where, found.valid_before, renew, state)


def _secret_items(access: AccessState) -> list[Item]:
    """The stored secrets; where one is not there, the variable that stands in for it."""
    settings, stored = access.settings, access.stored
    entries: list[tuple[str, Secret | None, str, SecretStr | None]] = [
        ("API token", stored.api_token, "ASC_AUTHENTIK_API_TOKEN", settings.authentik_api_token),
        ("app password", stored.app_password, "ASC_OIDC_APP_PASSWORD", settings.oidc_app_password),
    ]
    items = []
    for name, secret, variable, direct in entries:
        where, until, renew = str(settings.credentials_file), None, access.now
        if secret:
            until, renew = secret.expires, secret.renew_at(settings.authentik_refresh_skew_days) or access.now
            state = "expired" if secret.expired(access.now) else "valid" if secret.expires else "end not known"
        elif direct:
            where, state = variable, "end not known"
        else:
            state = "not usable" if access.credentials_problem else "missing"
        items.append(Item(name, where, until, renew if access.rotatable else None, state))
    return items
