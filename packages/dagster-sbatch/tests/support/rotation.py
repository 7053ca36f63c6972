"""For tests of the rotation: settings with and without a stored pair, and what has to hold after each refresh."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

import pytest

from dagster_sbatch import clock
from dagster_sbatch.auth import refresh
from dagster_sbatch.auth.credentials_file import Credentials
from dagster_sbatch.auth.http import public_trust
from dagster_sbatch.settings import Settings
from slurm_in_a_box import AuthentikControl, AuthentikServer
from support import access

Wind = Callable[[timedelta], None]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses between the tries of one refresh, no waiting for the disk, and the authorities are read once."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr("dagster_sbatch.auth.http.public_trust", cache(public_trust))
    monkeypatch.setattr("dagster_sbatch.auth.http.FIRST_PAUSE", 0.0)


@pytest.fixture
def variables(authentik: AuthentikServer, tmp_path: Path) -> dict[str, str]:
    return access.environment(authentik.base_url, tmp_path)


@pytest.fixture
def settings(variables: dict[str, str], control: AuthentikControl) -> Settings:
    """With a fresh bootstrap token."""
    return access.settings_of({**variables, "ASC_AUTHENTIK_API_TOKEN": access.bootstrap_token(control)})


@pytest.fixture
def later(settings: Settings, variables: dict[str, str]) -> Settings:
    """A pair is stored, and the bootstrap token is not set any more."""
    refresh(settings, rotation="now", certificate="no")
    return access.settings_of(variables)


@pytest.fixture
def wind(monkeypatch: pytest.MonkeyPatch) -> Wind:
    """Stops this machine's clock so much after the test's begin."""
    begun = datetime.now(UTC)
    return lambda later: monkeypatch.setattr(clock, "now", lambda: begun + later)


def stored(settings: Settings) -> Credentials:
    credentials = Credentials.read(settings.credentials_file)
    assert credentials is not None
    return credentials


def check_one_working_pair(settings: Settings, control: AuthentikControl) -> Credentials:
    """The file has a pair that works, and authentik has no other token of ours."""
    pair = stored(settings)
    assert pair.api_token is not None
    assert pair.app_password is not None
    assert access.api_token_works(settings, pair.api_token.value)
    assert access.app_password_works(settings, pair.app_password.value)
    assert access.made_here(control) == {pair.api_token.identifier, pair.app_password.identifier}
    assert set(pair.record) >= access.made_here(control)  # and names whose requests may yet arrive
    assert settings.credentials_file.stat().st_mode & 0o777 == 0o600
    return pair
