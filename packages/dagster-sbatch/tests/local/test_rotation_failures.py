"""Refreshes that fail: nothing piles up at authentik, nothing is recorded as done, each text says what to do."""

import base64
import json
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest

from dagster_sbatch.auth import (
    AccessError,
    BootstrapError,
    RejectedError,
    UnavailableError,
    check_health,
    ensure_certificate,
    refresh,
)
from dagster_sbatch.auth.authentik import request_oidc_token
from dagster_sbatch.auth.http import Http, HttpAnswer
from dagster_sbatch.auth.refresh_failures import RefreshFailures
from dagster_sbatch.settings import Settings
from slurm_in_a_box import AuthentikControl, AuthentikServer, Disturbance, wait_until
from support import access
from support.background import STRESS
from support.rotation import Wind, stored
from support.rotation import quick as quick
from support.rotation import variables as variables
from support.rotation import wind as wind

pytestmark = pytest.mark.local

HOURS = 24 if STRESS else 6
TO_DO = "read -rs ASC_AUTHENTIK_API_TOKEN && export ASC_AUTHENTIK_API_TOKEN && scripts/refresh_step_auth.py"


@pytest.fixture(autouse=True)
def one_try(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate is requested once."""
    monkeypatch.setattr("dagster_sbatch.auth.refresher.ISSUE_TRIES", 1)


@pytest.fixture
def settings(variables: dict[str, str], control: AuthentikControl) -> Settings:
    """A pair is stored; the bootstrap token that made it is gone."""
    token = control.create_token(access.USER, "api", "by-hand")
    refresh(access.settings_of({**variables, "ASC_AUTHENTIK_API_TOKEN": token}), rotation="now", certificate="no")
    found = access.settings_of(variables)
    access.delete_token(found, stored(found), "by-hand")
    return found


def delete_api_token(settings: Settings) -> None:
    """At authentik, behind the project's back."""
    pair = stored(settings)
    assert pair.api_token
    access.delete_token(settings, pair, pair.api_token.identifier)


# Hours of failures


def changed(**fields: bool) -> Callable[[AuthentikControl], None]:
    return lambda control: control.change_user(access.USER, **fields)


denied, inactive, keys_withheld = changed(allowed=False), changed(active=False), changed(views_keys=False)


def disturbed(**fields: object) -> Callable[[AuthentikControl], None]:
    return lambda control: control.disturb(Disturbance(**fields))  # type: ignore[arg-type]


def denied_and_not_deleted(control: AuthentikControl) -> None:
    denied(control)
    disturbed(kind="error", status=403, method="DELETE")(control)


def end(control: AuthentikControl) -> None:
    control.change_user(access.USER, allowed=True, active=True, views_keys=True)
    control.clear_disturbances()


FAILURES = {
    "denied the application": (denied, 2),
    "inactive": (inactive, 2),
    "keys withheld": (keys_withheld, 2),
    "app passwords cannot be made": (disturbed(kind="error", status=400, method="POST", path="/core/tokens/"), 2),
    "keys are not shown": (disturbed(kind="error", status=503, path="/view_key/"), 2),
    "tokens are made without an answer": (disturbed(kind="lost", method="POST", path="/core/tokens/"), 2),
    "unknown answers to app passwords": (disturbed(kind="error", status=418, path="/application/o/token/"), 2),
    "no answer to app passwords": (disturbed(kind="error", status=503, path="/application/o/token/"), 4),
    "denied the application, and nothing can be deleted": (denied_and_not_deleted, 6),
}
"""What goes wrong, and how many tokens there may be between two refreshes."""


@pytest.mark.parametrize(
    ("failure", "due"),
    [(failure, "due") for failure in FAILURES]
    + [(failure, "not due") for failure in ("denied the application", "inactive", "keys withheld")],
)
def test_tokens_do_not_pile_up_in_hours_of_failures(
    settings: Settings, control: AuthentikControl, wind: Wind, failure: str, due: str
) -> None:
    """The sensor refreshes when something is due, and a run without a certificate asks every half an hour."""
    begin, most = timedelta(days=24 if due == "due" else 0), 0
    fail, allowed = FAILURES[failure]
    fail(control)
    for minute in range(0, HOURS * 60, 5):
        wind(begin + timedelta(minutes=minute))
        health = check_health(settings)
        with suppress(AccessError):
            if health.next_refresh is not None and health.next_refresh <= health.now:
                refresh(settings)
            elif minute % 30 == 0:
                ensure_certificate(settings)
            else:
                continue
        most = max(most, len(access.made_here(control)))
    made = [each for each in control.requests() if (each.method, each.path) == ("POST", "/api/v3/core/tokens/")]
    assert most <= allowed
    attempts = 2 * HOURS + 7  # one every half an hour
    assert len(made) <= 2 + 6 * attempts  # three tries of two requests
    end(control)
    wind(begin + timedelta(days=1, hours=1))
    refresh(settings, certificate="no")
    wind(begin + timedelta(days=1, hours=2))
    refresh(settings, certificate="no")
    pair = stored(settings)
    assert pair.api_token
    assert pair.app_password
    assert access.made_here(control) == {pair.api_token.identifier, pair.app_password.identifier} == set(pair.record)
    assert access.app_password_works(settings, pair.app_password.value)
    assert "rotation" not in check_health(settings).failing


@pytest.mark.parametrize("wrong", [{}, {"ASC_OIDC_CLIENT_ID": "nobody"}])
def test_nothing_is_left_by_a_bootstrap_that_fails(
    variables: dict[str, str], control: AuthentikControl, wrong: dict[str, str]
) -> None:
    if not wrong:
        denied(control)
    chosen = {**variables, **wrong, "ASC_AUTHENTIK_API_TOKEN": access.bootstrap_token(control)}
    for _ in range(3):
        with pytest.raises(AccessError, match=r"ASC_OIDC_CLIENT_ID=.*(Ask the centre|documentation has it)"):
            refresh(access.settings_of(chosen), rotation="now", certificate="no")
        assert access.made_here(control) == set()
    assert stored(access.settings_of(chosen)).api_token is None


def test_a_request_that_arrives_after_its_client_has_died_leaves_nothing(
    settings: Settings, variables: dict[str, str], authentik: AuthentikServer, control: AuthentikControl, wind: Wind,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A proxy holds the request to make a token while the client is killed and the next refresh cleans up."""
    sent, go_on = threading.Event(), threading.Event()

    def hold_the_first(method: str, path: str) -> None:
        if method == "POST" and "/core/tokens/" in path and not sent.is_set():
            sent.set()
            go_on.wait(60)

    monkeypatch.setattr(authentik.disturbances, "take", hold_the_first)
    process = access.start(access.KILLED_AT_STEP, variables, "1000", "now", "no")
    assert sent.wait(60)
    names = set(stored(settings).record) - access.made_here(control)
    process.kill()
    process.communicate()
    wind(timedelta(0))
    refresh(settings, certificate="no")
    assert len(access.made_here(control)) == 2
    go_on.set()
    wait_until(lambda: names & access.made_here(control), "the request has arrived")
    refresh(settings, certificate="no")
    assert len(access.made_here(control)) == 2
    wind(timedelta(hours=2))
    refresh(settings, certificate="no")
    assert set(stored(settings).record) == access.made_here(control)


# Nothing is recorded as done that is not


def test_a_rotation_that_has_failed_stays_so_until_one_succeeds(
    settings: Settings, variables: dict[str, str], control: AuthentikControl, wind: Wind
) -> None:
    delete_api_token(settings)
    with pytest.raises(RejectedError):
        refresh(settings, rotation="now", certificate="no")
    for attempt in range(2, 5):
        wind(timedelta(hours=attempt))
        assert check_health(settings).verdict != "ok"
        assert "the secrets could not be replaced" in refresh(settings, certificate="no").warnings[0]
        failing = check_health(settings).failing["rotation"]
        assert failing.count == attempt
        assert TO_DO in failing.error
    again = access.settings_of({**variables, "ASC_AUTHENTIK_API_TOKEN": access.bootstrap_token(control)})
    wind(timedelta(hours=6))
    assert refresh(again, certificate="no").rotated_with == "bootstrap"
    assert check_health(settings).failing == {}


def test_a_dead_api_token_is_noticed_before_it_is_due(settings: Settings, control: AuthentikControl) -> None:
    delete_api_token(settings)
    assert refresh(settings, certificate="no").rotated_with is None
    health = check_health(settings)
    assert health.verdict != "ok"
    assert "Token invalid/expired" in health.summary
    assert TO_DO in health.summary


def test_an_outage_at_that_question_is_no_failure(settings: Settings, authentik: AuthentikServer) -> None:
    authentik.stop()
    assert refresh(settings, certificate="no").warnings == []
    assert check_health(settings).failing == {}


# What a person reads


def expired_there(settings: Settings, control: AuthentikControl) -> None:
    control.advance_clock(31 * access.DAY)


def revoked(settings: Settings, control: AuthentikControl) -> None:
    control.delete_tokens(access.USER)


def stale_copy(settings: Settings, control: AuthentikControl) -> None:
    before = settings.credentials_file.read_text()
    refresh(settings, rotation="now", certificate="no")
    settings.credentials_file.write_text(before)


@pytest.mark.parametrize("spoil", [expired_there, revoked, stale_copy, lambda _, control: inactive(control)])
def test_a_forced_rotation_without_a_token_that_works_says_what_to_do(
    settings: Settings, control: AuthentikControl, spoil: Callable[[Settings, AuthentikControl], None]
) -> None:
    spoil(settings, control)
    with pytest.raises(RejectedError) as error:
        refresh(settings, rotation="now", certificate="no")
    for words in ("HTTP 403", "expired", "user is not active", "a copy of another machine's file", f"\n  {TO_DO}"):
        assert words in str(error.value)


def test_a_revoked_bootstrap_token_is_told_with_what_to_do(
    variables: dict[str, str], control: AuthentikControl
) -> None:
    settings = access.settings_of({**variables, "ASC_AUTHENTIK_API_TOKEN": access.bootstrap_token(control)})
    control.delete_tokens(access.USER)
    with pytest.raises(RejectedError) as error:
        refresh(settings, rotation="now", certificate="no")
    assert "ASC_AUTHENTIK_API_TOKEN: authentik refused it (HTTP 403" in str(error.value)
    assert str(error.value).splitlines()[-1].strip().startswith(TO_DO)


def test_a_user_who_may_not_use_the_application_gets_the_four_ways_and_why(
    settings: Settings, control: AuthentikControl
) -> None:
    denied(control)
    with pytest.raises(BootstrapError) as error:
        refresh(settings)
    text = str(error.value)
    for variable in (
        "SLURM_EDGE_NODE_KEY_PATH",
        "ASC_AUTHENTIK_CREDENTIALS_FILE",
        "ASC_AUTHENTIK_API_TOKEN",
        "ASC_OIDC_APP_PASSWORD",
    ):
        assert f": {variable}" in text
    assert "not allowed to use the application of ASC_OIDC_CLIENT_ID=musica-step" in text
    assert "authentik refuses a secret that it has just made" in text
    with pytest.raises(BootstrapError, match="authentik refuses a secret that it has just made"):
        refresh(settings)  # while the failure pauses, it is said all the same


def test_a_token_made_by_a_crashing_authentik_is_temporary(settings: Settings, control: AuthentikControl) -> None:
    keys_withheld(control)
    with pytest.raises(
        UnavailableError, match=r"without the right to see its secret \(HTTP 403: You do not have"
    ) as error:
        refresh(settings, rotation="now", certificate="no")
    assert "If this repeats, ask the centre" in str(error.value)
    end(control)
    assert refresh(settings, rotation="now", certificate="no").rotated_with == "stored"
    assert len(access.made_here(control)) == 2


def test_a_right_that_is_missing_is_known_in_every_language(settings: Settings, control: AuthentikControl) -> None:
    for path, method, words in (
        ("/view_key/", "GET", "without the right to see its secret"),
        ("/core/tokens/", "POST", "does not allow this user to make tokens"),
    ):
        disturbed(kind="error", status=403, path=path, method=method)(control)
        with pytest.raises(AccessError, match=words):
            refresh(settings, rotation="now", certificate="no")


def test_refused_secrets_are_told_way_by_way(variables: dict[str, str], control: AuthentikControl) -> None:
    password = control.create_token(access.USER, "app_password", "by-hand")
    wrong = {"ASC_AUTHENTIK_API_TOKEN": password, "ASC_OIDC_APP_PASSWORD": "test-wrong-password"}
    with pytest.raises(BootstrapError) as error:
        ensure_certificate(access.settings_of({**variables, **wrong}))
    text = str(error.value)
    assert "3. an API token: ASC_AUTHENTIK_API_TOKEN\n     status: it is an App Password" in text
    assert "4. an app password: ASC_OIDC_APP_PASSWORD\n     status: authentik refused it" in text
    assert password not in text
    assert "test-wrong-password" not in text


def test_an_api_token_given_as_app_password_is_told_in_words(
    variables: dict[str, str], control: AuthentikControl
) -> None:
    token = access.bootstrap_token(control)
    with pytest.raises(BootstrapError, match="it is an API token, and an app password is needed") as error:
        refresh(access.settings_of({**variables, "ASC_OIDC_APP_PASSWORD": token}))
    assert token not in str(error.value)


def jwt(**claims: object) -> str:
    return f"e30.{base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip('=')}.x"


@pytest.mark.parametrize(
    ("id_token", "words"),
    [
        (jwt(iat=1, exp=2), r"no email\. Either your user at authentik has none .* 'Include claims in id_token' off"),
        (jwt(iat=1, exp=2, email=""), "no email"),
        (jwt(email="a@b.c"), "cannot be read"),
        ("a.b.c.d.e", "it is encrypted"),
        ("rubbish", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_token_that_is_of_no_use_is_told_with_its_cause(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, id_token: str | None, words: str
) -> None:
    answer = HttpAnswer(200, {"id_token": id_token} if id_token else {"access_token": "test-secret"}, None)
    monkeypatch.setattr(Http, "call", lambda *_, **__: answer)
    with pytest.raises(AccessError, match=words) as error:
        request_oidc_token(access.settings_of(variables), "x", Http())
    assert f". Tell the centre, with ASC_OIDC_CLIENT_ID={variables['ASC_OIDC_CLIENT_ID']}" in str(error.value)
    assert "test-secret" not in str(error.value)


def test_what_a_success_holds_is_in_no_text() -> None:
    answer = HttpAnswer(202, {"access_token": "test-secret"}, None)
    assert (answer.reason, "test-secret" in repr(answer)) == ("HTTP 202", False)


# Files


def test_an_error_of_the_file_system_is_never_a_lost_connection(
    settings: Settings, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever connects waits at an OSError, for the login node is what it knows."""
    key = tmp_path / "gone" / "key"
    monkeypatch.setattr("dagster_sbatch.auth.refresher.ensure_key", lambda _: key.read_text())
    with pytest.raises(AccessError, match=f"{key}: No such file or directory") as error:
        ensure_certificate(settings)
    assert not error.value.temporary
    assert str(key) in check_health(settings).failing["certificate"].error


def test_the_way_into_a_run_names_a_stale_list_of_authorities(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent/ca.pem")
    chosen = {**variables, "ASC_OIDC_TOKEN_URL": "https://127.0.0.1:1/", "ASC_OIDC_APP_PASSWORD": "test-app-password"}
    settings = access.settings_of(chosen)
    with pytest.raises(AccessError, match=r"SSL_CERT_FILE=/nonexistent/ca\.pem cannot be used") as error:
        ensure_certificate(settings)
    assert not error.value.temporary
    assert "SSL_CERT_FILE" in check_health(settings).summary


def test_a_success_that_cannot_be_recorded_is_one(
    settings: Settings, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = RefreshFailures(settings.credentials_file)
    failures.add("certificate", UnavailableError("away"))
    failures.add("rotation", UnavailableError("away"))

    def refuse(*_: object) -> None:
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr("dagster_sbatch.auth.refresh_failures.replace_file", refuse)
        failures.clear("certificate")
    failures.clear("certificate")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: Path("/nonexistent").read_text())
        failures.clear("rotation")
    assert set(check_health(settings).failing) == {"rotation"}
