"""Sites that take plain keys: nothing is renewed, and nothing is asked for but a key."""

import re
from pathlib import Path

import pytest

from dagster_sbatch.auth import BootstrapError, MisconfiguredError, Report, check_health, ensure_certificate, refresh
from dagster_sbatch.auth.key_files import certificate_path, ensure_key
from dagster_sbatch.settings import Settings
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
    with pytest.raises(MisconfiguredError, match="is a plain key and no ASC_ variable is set"):
        refresh(settings, rotation="now")


def test_without_a_key_nothing_is_asked_for_again_and_again(settings: Settings) -> None:
    health = check_health(settings)
    assert (health.verdict, health.next_refresh) == ("broken", None)
    asked = r"2\. a plain key, where .*\n.*does not exist\n.*\n +ssh-keygen -t ed25519"
    with pytest.raises(BootstrapError, match=asked) as error:
        ensure_certificate(settings)
    assert [line for line in str(error.value).splitlines() if "TOKEN" in line or "authentik" in line.lower()] == []


def test_a_certificate_that_is_of_no_use_is_named(settings: Settings, key: Path) -> None:
    certificate_path(key).write_text("nonsense")
    with pytest.raises(BootstrapError, match=r"id_musica-cert\.pub lies beside it\n.*\n +rm \S+id_musica-cert\.pub"):
        ensure_certificate(settings)


def test_a_site_that_asks_for_certificates_is_told_nothing_of_plain_keys(variables: dict[str, str]) -> None:
    with pytest.raises(BootstrapError) as error:
        ensure_certificate(access.settings_of({**variables, "ASC_OIDC_USERNAME": "xy12345"}))
    assert "plain key" not in str(error.value)


@pytest.mark.usefixtures("key")
def test_the_script_says_so(variables: dict[str, str], tmp_path: Path) -> None:
    done = run_program(ROOT / "scripts" / "refresh_step_auth.py", files=tmp_path, variables=variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"There is nothing to renew: a plain key, .*/id_musica: nothing expires\.\n", done.stdout)
