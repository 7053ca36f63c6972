"""Rotation of the stored secrets against authentik's stand-in: nothing lost, nothing left, whatever happens when."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from dagster_sbatch import clock
from dagster_sbatch.auth import (
    AccessError,
    BootstrapError,
    RejectedError,
    UnavailableError,
    check_health,
    http,
    refresh,
)
from dagster_sbatch.auth.authentik import Authentik, Intent
from dagster_sbatch.auth.credentials_file import Secret
from dagster_sbatch.auth.http import Http, HttpAnswer
from dagster_sbatch.settings import Settings
from slurm_in_a_box import AuthentikControl, AuthentikServer, Disturbance
from support import access
from support.background import STRESS
from support.rotation import check_one_working_pair, stored
from support.rotation import later as later
from support.rotation import quick as quick
from support.rotation import settings as settings
from support.rotation import variables as variables

pytestmark = [pytest.mark.local, pytest.mark.usefixtures("quick")]


@contextmanager
def impatient(authentik: AuthentikServer, path: str, kind: str, *, lasts: bool) -> Iterator[None]:
    """Let a client wait for 0.2 s where its request is answered late, and for as long as ever elsewhere."""
    call, take, patience = Http.call, authentik.disturbances.take, http.TRY_SECONDS
    disturbed = kind in ("late", "slow")

    def take_and_note(method: str, place: str) -> Disturbance | None:
        nonlocal disturbed
        if (found := take(method, place)) and not lasts:
            disturbed, http.TRY_SECONDS = False, patience
        return found

    def call_impatiently(client: Http, method: str, url: str, **options: Any) -> HttpAnswer:
        http.TRY_SECONDS = 0.2 if disturbed and path in url else patience
        return call(client, method, url, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http, "TRY_SECONDS", patience)
        patch.setattr(authentik.disturbances, "take", take_and_note)
        patch.setattr(Http, "call", call_impatiently)
        yield


def in_days(monkeypatch: pytest.MonkeyPatch, days: float) -> None:
    """Move this machine's clock."""
    monkeypatch.setattr(clock, "now", lambda: datetime.now(UTC) + timedelta(days=days))


def test_the_bootstrap_token_makes_the_file(settings: Settings, control: AuthentikControl) -> None:
    before = datetime.now(UTC)
    report = refresh(settings, rotation="now", certificate="no")
    assert report.rotated_with == "bootstrap"
    pair = check_one_working_pair(settings, control)
    assert pair.api_token
    assert pair.api_token.expires
    by_server = next(token for token in control.tokens() if token.identifier == pair.api_token.identifier)
    assert pair.api_token.expires.timestamp() == pytest.approx(by_server.expires, abs=0.001)
    assert before <= (pair.api_token.created or before - timedelta(1)) <= datetime.now(UTC)
    created = [request for request in control.requests() if request.method == "POST" and "/tokens/" in request.path]
    assert len(created) == 2
    assert all('"expires"' not in request.body and '"expiring"' not in request.body for request in created)


def test_the_stored_token_makes_the_next_pair(later: Settings, control: AuthentikControl) -> None:
    first = stored(later)
    report = refresh(later, rotation="now", certificate="no")
    assert report.rotated_with == "stored"
    second = check_one_working_pair(later, control)
    assert first.api_token
    assert first.app_password
    assert second.api_token
    assert second.api_token.value != first.api_token.value
    assert not access.api_token_works(later, first.api_token.value)
    assert not access.app_password_works(later, first.app_password.value)


def test_the_old_pair_leaves_the_file_before_it_is_deleted(later: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    deleted, delete = [], Authentik.delete

    def look_and_delete(authentik: Authentik, identifier: str) -> None:
        pair = stored(later)
        assert pair.api_token and pair.app_password
        assert identifier not in (pair.api_token.identifier, pair.app_password.identifier)
        deleted.append(identifier)
        delete(authentik, identifier)

    before = stored(later)
    monkeypatch.setattr(Authentik, "delete", look_and_delete)
    refresh(later, rotation="now", certificate="no")
    assert before.api_token and before.app_password
    assert deleted == [before.api_token.identifier, before.app_password.identifier]


def test_nothing_is_done_before_it_is_due(
    later: Settings, control: AuthentikControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    for days, rotated in ((22.9, None), (23.1, "stored")):
        in_days(monkeypatch, days)
        assert refresh(later, certificate="no").rotated_with == rotated


@pytest.mark.parametrize(
    ("lifetime", "skew_days", "due_before_end"),
    [
        (30 * access.DAY, None, 7 * access.DAY),
        (1800, None, 600),
        (9 * access.DAY, None, 3 * access.DAY),
        (30 * access.DAY, "10", 10 * access.DAY),
        (30 * access.DAY, "20", 15 * access.DAY),  # not always due
        (1800, "7", 900),
    ],
)
def test_when_it_is_due(
    variables: dict[str, str], control: AuthentikControl, lifetime: float, skew_days: str | None, due_before_end: float
) -> None:
    bootstrap = access.bootstrap_token(control)
    control.set_lifetimes(token=lifetime)
    skew = {"ASC_AUTHENTIK_REFRESH_SKEW_DAYS": skew_days} if skew_days else {}
    settings = access.settings_of({**variables, **skew, "ASC_AUTHENTIK_API_TOKEN": bootstrap})
    refresh(settings, rotation="now", certificate="no")
    health = check_health(settings)
    token = next(item for item in health.items if item.name == "API token")
    assert token.valid_until
    assert token.renew_at
    assert (token.valid_until - token.renew_at).total_seconds() == pytest.approx(due_before_end, abs=5)
    assert refresh(settings, certificate="no").rotated_with is None


def test_an_expired_stored_token_does_not_stand_before_a_fresh_bootstrap_token(
    later: Settings, variables: dict[str, str], control: AuthentikControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    control.advance_clock(31 * access.DAY)
    in_days(monkeypatch, 31)
    with pytest.raises(BootstrapError, match=r"its API token expired at .* and its app password expired at"):
        refresh(later, certificate="no")
    again = access.settings_of({**variables, "ASC_AUTHENTIK_API_TOKEN": access.bootstrap_token(control)})
    assert refresh(again, certificate="no").rotated_with == "bootstrap"
    check_one_working_pair(again, control)


def test_a_stored_token_that_was_deleted_gives_way_to_the_bootstrap_token(
    later: Settings, variables: dict[str, str], control: AuthentikControl
) -> None:
    control.delete_tokens(access.USER)
    with pytest.raises(RejectedError, match=r"musica-auth.env: authentik refused it .*Token invalid/expired"):
        refresh(later, rotation="now", certificate="no")
    again = access.settings_of({**variables, "ASC_AUTHENTIK_API_TOKEN": access.bootstrap_token(control)})
    assert refresh(again, rotation="now", certificate="no").rotated_with == "bootstrap"
    check_one_working_pair(again, control)


def test_an_app_password_given_as_api_token_is_told_in_words(
    variables: dict[str, str], control: AuthentikControl
) -> None:
    password = control.create_token(access.USER, "app_password", "by-hand")
    settings = access.settings_of({**variables, "ASC_AUTHENTIK_API_TOKEN": password})
    why = r"^No secrets can be made: .*it is an App Password.*use 'New Token' .*, not 'New App"
    with pytest.raises(RejectedError, match=why) as error:
        refresh(settings, rotation="now", certificate="no")
    assert password not in str(error.value)
    assert not settings.credentials_file.exists()


def test_a_token_of_another_user_is_refused_before_anything_is_made(
    variables: dict[str, str], control: AuthentikControl
) -> None:
    control.create_user("colleague")
    token = control.create_token("colleague", "api", "theirs")
    settings = access.settings_of({**variables, "ASC_AUTHENTIK_API_TOKEN": token})
    with pytest.raises(AccessError, match="belongs to 'colleague', not to ASC_OIDC_USERNAME=xy12345"):
        refresh(settings, rotation="now", certificate="no")
    assert [each.identifier for each in control.tokens("colleague")] == ["theirs"]


@pytest.mark.parametrize("own_token", [False, True])
def test_the_credentials_of_another_user_are_left_alone(
    own_token: bool, later: Settings, variables: dict[str, str], control: AuthentikControl
) -> None:
    """Two projects of one account here, with two users there, have the same default name of this file."""
    control.create_user("colleague")
    token = control.create_token("colleague", "api", "theirs") if own_token else ""
    theirs = {**variables, "ASC_OIDC_USERNAME": "colleague", "ASC_AUTHENTIK_API_TOKEN": token}
    before = later.credentials_file.read_text()
    problem = "has the credentials of 'xy12345', not of ASC_OIDC_USERNAME=colleague.*Set ASC_AUTHENTIK_CREDENTIALS_FILE"
    with pytest.raises(AccessError, match=problem):
        refresh(access.settings_of(theirs))
    assert not later.credentials_file.with_name(later.credentials_file.name + ".failing").exists()
    assert refresh(later, certificate="no").rotated_with is None
    assert later.credentials_file.read_text() == before


@pytest.mark.parametrize("value", ["two words", "line\nbreak", "ümlaut"])
def test_a_token_that_was_pasted_wrongly_is_refused_without_being_shown(variables: dict[str, str], value: str) -> None:
    settings = access.settings_of({**variables, "ASC_AUTHENTIK_API_TOKEN": value})
    with pytest.raises(RejectedError, match="was not pasted whole") as error:
        refresh(settings, rotation="now", certificate="no")
    assert value not in str(error.value)


def test_files_of_dagster_slurm_are_kept_going(variables: dict[str, str], control: AuthentikControl) -> None:
    api = control.create_token(access.USER, "api", "dagster-slurm-api-20261101120000")
    app = control.create_token(access.USER, "app_password", "dagster-slurm-app-20261101120000")
    settings = access.settings_of(variables)
    expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    settings.credentials_file.touch(mode=0o600)
    settings.credentials_file.write_text(
        f'ASC_AUTHENTIK_API_TOKEN="{api}"\n'
        'ASC_AUTHENTIK_API_TOKEN_ID="dagster-slurm-api-20261101120000"\n'
        f'ASC_AUTHENTIK_API_TOKEN_EXPIRES_AT="{expires:%Y-%m-%dT%H:%M:%SZ}"\n'
        f'ASC_OIDC_APP_PASSWORD="{app}"\n'
        'ASC_OIDC_APP_PASSWORD_ID="dagster-slurm-app-20261101120000"\n'
        f'ASC_OIDC_APP_PASSWORD_EXPIRES_AT="{expires:%Y-%m-%dT%H:%M:%SZ}"\n'
        "export OF_THE_USER='a $value'  # and a word on it\n"
    )
    assert stored(settings).app_password == Secret(app, "dagster-slurm-app-20261101120000", expires)
    assert refresh(settings, rotation="now", certificate="no").rotated_with == "stored"
    check_one_working_pair(settings, control)
    assert "export OF_THE_USER='a $value'  # and a word on it\n" in settings.credentials_file.read_text()


def test_tokens_that_are_not_ours_are_left_alone(later: Settings, control: AuthentikControl) -> None:
    control.create_token(access.USER, "api", "dagster-slurm-api-of-another-machine")  # our prefix, not in our record
    control.create_token(access.USER, "api", "by-hand")
    marked = replace(stored(later), record=(*stored(later).record, "by-hand"))  # in our record, not our prefix
    marked.write(later.credentials_file)
    refresh(later, rotation="now", certificate="no")
    left = {token.identifier for token in control.tokens(access.USER)}
    assert {"dagster-slurm-api-of-another-machine", "by-hand"} <= left
    assert len(access.made_here(control)) == 3


def test_an_old_token_that_cannot_be_deleted_is_deleted_by_the_next_refresh(
    later: Settings, control: AuthentikControl
) -> None:
    control.disturb(Disturbance("error", status=403, method="DELETE"))
    report = refresh(later, rotation="now", certificate="no")
    assert len(report.warnings) == 2
    assert "could not be deleted yet" in report.warnings[0]
    assert len(access.made_here(control)) == 4
    control.clear_disturbances()
    assert refresh(later, certificate="no").warnings == []
    check_one_working_pair(later, control)


def test_a_repeated_request_that_arrives_after_its_token_was_deleted_leaves_nothing(
    later: Settings, control: AuthentikControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, create = [], Authentik.create

    def note_and_create(authentik: Authentik, identifier: str, intent: Intent) -> datetime:
        made.append(identifier)
        return create(authentik, identifier, intent)

    control.disturb(Disturbance("error", status=503, path="/view_key/"))
    with monkeypatch.context() as patch, pytest.raises(UnavailableError, match="HTTP 503"):
        patch.setattr(Authentik, "create", note_and_create)
        refresh(later, rotation="now", certificate="no")
    control.clear_disturbances()
    check_one_working_pair(later, control)
    assert len(made) == 2
    control.create_token(access.USER, "api", made[0])
    in_days(monkeypatch, 0.01)
    refresh(later, certificate="no")
    check_one_working_pair(later, control)


@pytest.mark.parametrize("path", ["/users/me/", "/core/tokens/", "/view_key/", "/application/o/token/"])
@pytest.mark.parametrize("kind", ["error", "lost", "late"])
def test_a_passing_disturbance_changes_nothing(
    later: Settings, authentik: AuthentikServer, control: AuthentikControl, path: str, kind: str
) -> None:
    control.disturb(Disturbance(kind, seconds=0.6, path=path, times=1))  # type: ignore[arg-type]
    with impatient(authentik, path, kind, lasts=False):
        assert refresh(later, rotation="now", certificate="no").rotated_with == "stored"
    check_one_working_pair(later, control)


@pytest.mark.parametrize("path", ["/users/me/", "/core/tokens/", "/view_key/", "/application/o/token/"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("error", "it cannot answer now"),
        ("lost", "cannot be reached"),
        ("late", "no answer within"),
        ("slow", "no answer within|the answer takes longer"),
    ],
)
def test_a_lasting_disturbance_keeps_a_working_pair(
    later: Settings, authentik: AuthentikServer, control: AuthentikControl, path: str, kind: str, words: str
) -> None:
    control.disturb(Disturbance(kind, seconds=0.6, path=path))  # type: ignore[arg-type]
    with impatient(authentik, path, kind, lasts=True), pytest.raises(UnavailableError, match=words):
        refresh(later, rotation="now", certificate="no")
    health = check_health(later)
    assert health.failing["rotation"].count == 1
    control.clear_disturbances()
    refresh(later, rotation="now", certificate="no")
    check_one_working_pair(later, control)
    assert check_health(later).failing == {}


def test_an_authentik_that_is_down_is_told_as_such(
    later: Settings, authentik: AuthentikServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    authentik.stop()
    in_days(monkeypatch, 25)
    report = refresh(later, certificate="no")
    assert "the secrets could not be replaced: http://127.0.0.1" in report.warnings[0]
    assert "refused" in report.warnings[0]  # the connection
    authentik.start()
    in_days(monkeypatch, 25.01)  # the pause is over
    assert refresh(later, certificate="no").rotated_with == "stored"
    check_one_working_pair(later, authentik.control)


def test_after_failures_it_waits_longer_and_longer(
    later: Settings, authentik: AuthentikServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    authentik.stop()
    start, tried = datetime.now(UTC) + timedelta(days=25), []
    for minute in range(120):
        now = start + timedelta(minutes=minute)
        monkeypatch.setattr(clock, "now", lambda now=now: now)
        if refresh(later, certificate="no").warnings:
            tried.append(minute)
    assert tried == [0, 1, 3, 7, 15, 31, 61, 91]
    failing = check_health(later).failing["rotation"]
    assert (failing.since, failing.count) == (start, 8)


@pytest.mark.parametrize("gone", ["api", "app"])
def test_a_new_pair_that_does_not_work_is_not_taken(
    later: Settings, control: AuthentikControl, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    """One of the two new tokens disappears at authentik before it is tried."""
    before, view_key = stored(later), Authentik.view_key

    def view_and_delete(authentik: Authentik, identifier: str) -> str:
        key = view_key(authentik, identifier)
        if f"-{gone}-" in identifier:
            access.delete_token(later, before, identifier)
        return key

    with monkeypatch.context() as patch:
        patch.setattr(Authentik, "view_key", view_and_delete)
        with pytest.raises(AccessError, match="authentik refuses a secret that it has just made"):
            refresh(later, rotation="now", certificate="no")
    assert check_one_working_pair(later, control).api_token == before.api_token  # what was made is gone again
    in_days(monkeypatch, 0.01)  # the pause is over
    assert refresh(later, certificate="no").rotated_with == "stored"
    assert check_one_working_pair(later, control).api_token != before.api_token


def test_while_it_cannot_be_told_whether_the_new_pair_works_the_old_one_stays(
    later: Settings, control: AuthentikControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stored(later)
    control.disturb(Disturbance("error", status=503, path="/application/o/token/"))
    with pytest.raises(UnavailableError, match=r"HTTP 503"):
        refresh(later, rotation="now", certificate="no")
    control.clear_disturbances()
    assert check_one_working_pair(later, control).api_token == before.api_token
    in_days(monkeypatch, 0.01)
    assert refresh(later, certificate="no").rotated_with == "stored"
    assert check_one_working_pair(later, control).api_token != before.api_token


@pytest.mark.parametrize("days", [0.02, 30])
def test_lifetimes_of_the_two_secrets(
    variables: dict[str, str], control: AuthentikControl, monkeypatch: pytest.MonkeyPatch, days: float
) -> None:
    """Both clocks move together; each quarter of a window somebody looks, and nobody else does anything."""
    bootstrap = access.bootstrap_token(control)
    control.set_lifetimes(token=days * access.DAY)
    refresh(access.settings_of({**variables, "ASC_AUTHENTIK_API_TOKEN": bootstrap}), rotation="now", certificate="no")
    settings = access.settings_of(variables)
    rotations, now, lifetimes = 0, 0.0, 6 if STRESS else 2
    while now < lifetimes * days:
        now += days / 15
        control.advance_clock(days / 15 * access.DAY)
        in_days(monkeypatch, now)
        rotations += refresh(settings, certificate="no").rotated_with is not None
        check_one_working_pair(settings, control)
    assert 7 <= rotations <= 9 if STRESS else 2 <= rotations <= 3
