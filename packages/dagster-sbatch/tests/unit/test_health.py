"""What is said of access from the files alone: what there is, what ends, what is wrong, and what to do."""

import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError

from dagster_sbatch import clock
from dagster_sbatch.auth import AccessError, BootstrapError, check_health, ensure_certificate, refresh
from dagster_sbatch.auth.credentials_file import Credentials, Secret, Source
from dagster_sbatch.auth.http import Http
from dagster_sbatch.auth.keys import certificate_path
from dagster_sbatch.auth.refresh_failures import RefreshFailures
from dagster_sbatch.auth.ways import read_access
from dagster_sbatch.settings import Settings
from support import access

HOUR = 3600.0
LATER = datetime.now(UTC) + timedelta(days=30)
PAIR = Credentials(Secret("test-api-token", "x-api", LATER), Secret("test-app-password", "x-app", LATER))
PASSWORD = {"ASC_OIDC_APP_PASSWORD": "test-app-password"}


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Http, "call", None)


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    """No secret, and a certificate of a person's for an hour."""
    found = access.environment("http://127.0.0.1:1", tmp_path)
    access.certify(Path(found["SLURM_EDGE_NODE_KEY_PATH"]), HOUR)
    return found


def file_of(variables: dict[str, str]) -> Path:
    return access.settings_of(variables).credentials_file


def test_on_the_login_node_nothing_is_needed(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sbatch").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    lacking = ("SLURM_EDGE_NODE_USER", "SLURM_EDGE_NODE_KEY_PATH")
    left = {name: value for name, value in variables.items() if name not in lacking}
    settings = access.settings_of({**left, "SLURM_EDGE_NODE_HOST": "localhost"})
    health = check_health(settings)
    assert (health.verdict, health.next_refresh) == ("ok", None)
    assert ensure_certificate(settings) is None
    assert refresh(settings, "now", "now").certificate is None


def test_a_certificate_that_nothing_renews_works_until_its_end(variables: dict[str, str]) -> None:
    settings = access.settings_of(variables)
    health = check_health(settings)
    assert (health.verdict, health.next_refresh) == ("ok", None)
    assert "nothing renews access: it ends at" in health.summary
    with pytest.raises(BootstrapError) as error:  # a new one is asked for, and there is nothing to get it with
        refresh(settings, certificate="now")
    text = str(error.value)
    assert text.startswith("The certificate works until 20")
    assert "but is not renewed" in text
    assert "1. a valid certificate" not in text
    assert "  1. stored credentials: ASC_AUTHENTIK_CREDENTIALS_FILE=" in text
    assert check_health(settings).verdict == "ok"
    assert check_health(settings).failing == {}  # to ask was wrong; nothing is broken


@pytest.mark.parametrize("left", ["", "OTHER=1\n", "ASC_AUTHENTIK_API_TOKEN=\nASC_AUTHENTIK_TOKEN_RECORD='x y'\n"])
def test_a_file_that_has_lost_its_secrets_is_told_while_access_works(variables: dict[str, str], left: str) -> None:
    file = file_of(variables)
    PAIR.write(file)
    file.write_text(left)
    health = check_health(access.settings_of(variables))
    assert health.verdict == "failing"
    lost = f"nothing can be renewed: {file}: it has no API token and it has no app password\nAccess works until "
    assert health.summary.startswith(lost)
    assert health.notes == ()  # when access ends is said


def test_secrets_in_variables_are_shown_with_the_variable(variables: dict[str, str]) -> None:
    token = {"ASC_AUTHENTIK_API_TOKEN": "test-api-token"}
    expected = {
        "API token": ("ASC_AUTHENTIK_API_TOKEN", "end not known"),
        "app password": ("ASC_OIDC_APP_PASSWORD", "end not known"),
    }
    items = check_health(access.settings_of({**variables, **PASSWORD, **token})).items
    assert {item.name: (item.where, item.state) for item in items[1:]} == expected
    PAIR.write(file_of(variables))  # what is stored comes first
    items = check_health(access.settings_of({**variables, **PASSWORD, **token})).items
    assert {item.state for item in items[1:]} == {"valid"}
    assert {item.where for item in items[1:]} == {variables["ASC_AUTHENTIK_CREDENTIALS_FILE"]}


def test_a_file_that_others_can_read_is_told_with_the_one_command_that_fixes_it(variables: dict[str, str]) -> None:
    file = file_of(variables)
    PAIR.write(file)
    file.chmod(0o644)
    settings = access.settings_of(variables)
    health = check_health(settings)
    assert health.verdict == "failing"
    assert (
        f"nothing can be renewed: {file} can be read by others (mode 0644). Close it:\n  chmod 600 " in health.summary
    )
    assert [item.state for item in health.items] == ["valid", "not usable", "not usable"]
    certificate_path(Path(variables["SLURM_EDGE_NODE_KEY_PATH"])).unlink()
    with pytest.raises(BootstrapError, match=r"       chmod 600 \S+\n     to do: do what the status says\n"):
        refresh(settings)
    with pytest.raises(AccessError, match=r"chmod 600"):
        refresh(settings, rotation="now", certificate="no")


def test_secrets_that_are_not_replaced_do_not_keep_from_a_certificate(variables: dict[str, str]) -> None:
    file = file_of(variables)
    PAIR.write(file)
    RefreshFailures(file).add("rotation", AccessError("authentik is away"))
    settings = access.settings_of(variables)
    assert "Access works until" in check_health(settings).summary
    certificate_path(Path(variables["SLURM_EDGE_NODE_KEY_PATH"])).unlink()
    health = check_health(settings)
    assert health.verdict == "failing"
    assert health.summary.endswith("authentik is away\nNevertheless, a certificate can be requested")
    RefreshFailures(file).add("certificate", AccessError("the authority is away"))
    assert check_health(settings).verdict == "broken"


def test_what_to_do_after_both_secrets_were_deleted_at_authentik_is_said_once(variables: dict[str, str]) -> None:
    """The certificate and the secrets fail for the same reason."""
    file, settings = file_of(variables), access.settings_of(variables)
    PAIR.write(file)
    certificate_path(Path(variables["SLURM_EDGE_NODE_KEY_PATH"])).unlink()
    refusals: dict[Source, str] = {"stored": "authentik refused it"}
    failures = RefreshFailures(file)
    failures.add("rotation", read_access(settings).explain_rotation(refusals))
    failures.add("certificate", read_access(settings).explain(refusals))
    summary = check_health(settings).summary
    assert summary.startswith("the certificate could not be renewed since ")
    assert "\nthe stored secrets could not be renewed since " in summary
    assert summary.endswith("): see above")
    assert summary.count("read -rs ASC_AUTHENTIK_API_TOKEN && ") == 1


def test_what_has_expired_is_told_with_its_end(variables: dict[str, str]) -> None:
    certificate_path(Path(variables["SLURM_EDGE_NODE_KEY_PATH"])).unlink()
    assert PAIR.api_token
    expired = replace(PAIR.api_token, expires=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    replace(PAIR, api_token=expired, app_password=None).write(file_of(variables))
    health = check_health(access.settings_of(variables))
    assert health.verdict == "broken"
    assert "its API token expired at 2026-01-02 03:04:05 UTC and it has no app password" in health.summary
    assert [item.state for item in health.items] == ["missing", "expired", "missing"]


def test_without_any_way_the_four_are_named_with_their_variables(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    key, file = variables["SLURM_EDGE_NODE_KEY_PATH"], file_of(variables)
    assert PAIR.api_token
    expired = replace(PAIR.api_token, expires=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    Credentials(api_token=expired).write(file)
    later = datetime.now(UTC) + timedelta(hours=2)
    monkeypatch.setattr(clock, "now", lambda: later)  # the certificate has expired
    for function in (ensure_certificate, refresh):
        with pytest.raises(BootstrapError) as error:
            function(access.settings_of(variables))
        text = str(error.value)
        for words in (
            f"  1. a valid certificate beside the key: SLURM_EDGE_NODE_KEY_PATH={key}\n     status: expired at 20",
            "     to do: log in with a browser (the first time, `step ca bootstrap` comes before: "
            "scripts/docs credentials):\n"
            f"       step ssh certificate 'your.email@example.com' {key} ",
            f"  2. stored credentials: ASC_AUTHENTIK_CREDENTIALS_FILE={file}\n"
            f"     status: {file}: its API token expired at 2026-01-02 03:04:05 UTC and it has no app password",
            "  3. an API token: ASC_AUTHENTIK_API_TOKEN\n     status: not set",
            "       read -rs ASC_AUTHENTIK_API_TOKEN && export ASC_AUTHENTIK_API_TOKEN && "
            "scripts/refresh_step_auth.py --rotate-credentials --refresh-step-after-rotate\n",
            "  4. an app password: ASC_OIDC_APP_PASSWORD\n     status: not set",
            "'New Token' (before 2026.2: 'Create Token')",
            "'New App Password' (before 2026.2: 'Create App password')",
        ):
            assert words in text
        assert "test-api-token" not in text
    assert check_health(access.settings_of(variables)).verdict == "broken"


def test_variables_that_are_missing_are_named(variables: dict[str, str]) -> None:
    del variables["ASC_OIDC_CLIENT_ID"]
    with pytest.raises(BootstrapError, match="\nThey also need settings that are not set: ASC_OIDC_CLIENT_ID"):
        refresh(access.settings_of(variables), certificate="now")  # while a certificate is valid
    certificate_path(Path(variables["SLURM_EDGE_NODE_KEY_PATH"])).unlink()
    with pytest.raises(
        BootstrapError, match=r"4\. an app password.*\n     status: ASC_OIDC_CLIENT_ID not set"
    ) as error:
        ensure_certificate(access.settings_of({**variables, **PASSWORD}))
    assert "All but a certificate also need settings that are not set: ASC_OIDC_CLIENT_ID (" in str(error.value)


@pytest.mark.parametrize("value", ["inf", "nan", "1e300", "0"])
@pytest.mark.parametrize("name", ["ASC_STEP_REFRESH_SKEW", "ASC_AUTHENTIK_REFRESH_SKEW_DAYS"])
def test_a_time_before_the_end_that_is_no_time_is_refused(name: str, value: str) -> None:
    with pytest.raises(ValidationError):
        Settings.model_validate({name: value})
