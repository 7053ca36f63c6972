"""Sites that take plain keys: nothing is renewed, and nothing is asked for but a key."""

import re
from pathlib import Path

import pytest

from dagster_sbatch.auth import (
    AccessError,
    BootstrapError,
    Report,
    check_health,
    ensure_certificate,
    refresh,
)
from dagster_sbatch.auth.keys import certificate_path, ensure_key
from dagster_sbatch.auth.refresh_failures import RefreshFailures
from dagster_sbatch.settings import Settings
from dagster_sbatch.ssh.client_config import Hop
from dagster_sbatch.ssh.user_key import UserKey
from support import ROOT, access
from support.own_files import run_program


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    """Those of a supercomputer, without any that begins with ASC_."""
    found = access.environment("https://authentik.test", tmp_path)
    return {name: value for name, value in found.items() if not name.startswith("ASC_")} | {"HOME": str(tmp_path)}


@pytest.fixture
def settings(variables: dict[str, str]) -> Settings:
    return access.settings_of(variables)


@pytest.fixture
def key(variables: dict[str, str]) -> Path:
    path = Path(variables["SLURM_EDGE_NODE_KEY_PATH"])
    ensure_key(path)
    return path


@pytest.mark.usefixtures("key")
def test_with_a_key_nothing_is_to_be_done(settings: Settings) -> None:
    assert ensure_certificate(settings) is None
    assert refresh(settings, certificate="now") == Report()
    with pytest.raises(AccessError, match="is a plain key, and no ASC_ variable is set"):
        refresh(settings, rotation="now")


def test_a_failure_from_the_time_with_certificates_is_no_failure_of_the_key(settings: Settings, key: Path) -> None:
    RefreshFailures(settings.credentials_file).add("certificate", AccessError("the authority is away"))
    health = check_health(settings)
    assert (health.verdict, health.summary) == ("ok", f"a plain key, {key}: nothing expires")
    assert {item.state for item in health.items} == {"not used"}


def test_what_a_server_says_that_refuses_the_key_leads_to_no_refresh(key: Path) -> None:
    """There is nothing that a refresh could renew."""
    refused = UserKey.load(key).refused(Hop("login.test", 22, "xy12345", key, ()), ["publickey"], partial=False)
    assert f"If the site accepts plain keys, give it {key}.pub, for 'xy12345'." in str(refused)
    assert "refresh" not in str(refused)


def test_without_a_key_nothing_is_asked_for_again_and_again(settings: Settings) -> None:
    health = check_health(settings)
    assert (health.verdict, health.next_refresh) == ("broken", None)
    asked = r"2\. a plain key, where .*\n.*does not exist\n.*\n +ssh-keygen -t ed25519"
    with pytest.raises(BootstrapError, match=asked) as error:
        ensure_certificate(settings)
    assert [line for line in str(error.value).splitlines() if "TOKEN" in line or "authentik" in line.lower()] == []


def test_a_certificate_that_is_of_no_use_is_named(settings: Settings, key: Path) -> None:
    certificate_path(key).write_text("nonsense")
    with pytest.raises(BootstrapError, match=r"has a certificate, \S+-cert\.pub\n.*\n +rm \S+id_musica-cert\.pub"):
        ensure_certificate(settings)


def test_a_certificate_from_elsewhere_for_another_user(variables: dict[str, str], key: Path) -> None:
    access.certify(key, 3600.0)
    (note,) = check_health(access.settings_of({**variables, "SLURM_EDGE_NODE_USER": "jane"})).notes
    assert note.endswith("Set SLURM_EDGE_NODE_USER to one of those, or get a certificate for that name")


def test_a_site_that_asks_for_certificates_is_told_nothing_of_plain_keys(variables: dict[str, str]) -> None:
    with pytest.raises(BootstrapError) as error:
        ensure_certificate(access.settings_of({**variables, "ASC_OIDC_USERNAME": "xy12345"}))
    assert "plain key" not in str(error.value)


@pytest.mark.usefixtures("key")
def test_the_script_says_so(variables: dict[str, str], tmp_path: Path) -> None:
    done = run_program(ROOT / "scripts" / "refresh_step_auth.py", files=tmp_path, variables=variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"There is nothing to renew: a plain key, .*/id_musica: nothing expires\.\n", done.stdout)
    done = run_program(ROOT / "scripts" / "refresh_step_auth.py", "--status", files=tmp_path, variables=variables)
    assert "see below" not in done.stdout  # there is nothing
