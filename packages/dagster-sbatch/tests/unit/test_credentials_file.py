"""The credentials file: what is read, what is refused, and that a replacement is whole."""

import errno
import fcntl
import os
import shlex
import stat
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from dotenv import dotenv_values

from dagster_sbatch.auth import AccessError, UnsafeFileError, refresh
from dagster_sbatch.auth.credentials_file import Credentials, Secret
from support import access

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
PAIR = Credentials(
    api_token=Secret("test-api-token", "dagster-slurm-api-1", NOON + timedelta(days=30), NOON),
    app_password=Secret("test-app-password", "dagster-slurm-app-1", NOON + timedelta(days=30), NOON),
    record=("dagster-slurm-api-1", "dagster-slurm-app-1"),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "config" / "auth.env"


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.touch()
    path.chmod(mode)
    path.write_text(text)
    return path


def test_what_is_written_is_read(path: Path) -> None:
    assert Credentials.read(path) is None
    for credentials in (PAIR, Credentials(), Credentials(api_token=PAIR.api_token, others="X='1 2'\n")):
        credentials.write(path)
        assert Credentials.read(path) == credentials


def test_it_is_private_from_its_first_byte(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    fsync = os.fsync

    def look(descriptor: int) -> None:
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    before = os.umask(0)
    try:
        PAIR.write(path)
    finally:
        os.umask(before)
    assert modes == [0o600, 0o700]  # the file before it has its name, then its folder
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_dotenv_and_the_shell_read_it_alike(path: Path) -> None:
    PAIR.write(path)
    values = dotenv_values(path)
    assert values["ASC_AUTHENTIK_API_TOKEN"] == "test-api-token"
    assert values["ASC_OIDC_APP_PASSWORD_EXPIRES_AT"] == "2026-12-24T12:00:00+00:00"
    script = f". {shlex.quote(str(path))}; set"
    shell = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True, env={}).stdout
    for name, value in values.items():
        assert f"{name}='{value}'" in shell or f"{name}={value}" in shell


def test_secrets_are_in_no_representation() -> None:
    assert "of the user" not in repr(replace(PAIR, others="OTHER_SECRET='of the user'\n"))
    assert "test-api-token" not in repr(PAIR)
    assert "test-app-password" not in repr(PAIR)


@pytest.mark.parametrize(
    "written",
    ["2026-12-24T12:00:00+00:00", "2026-12-24T12:00:00Z", "2026-12-24T13:00:00+01:00", "2026-12-24T12:00:00"],
)
def test_times_are_utc(path: Path, written: str) -> None:
    text = f'ASC_OIDC_APP_PASSWORD=x\nASC_OIDC_APP_PASSWORD_EXPIRES_AT="{written}"\n'
    found = Credentials.read(write(path, text))
    assert found
    assert found.app_password
    assert found.app_password.expires == NOON + timedelta(days=30)


@pytest.mark.parametrize(
    ("text", "api", "app"),
    [
        ("", None, None),
        ("# only words\n\n", None, None),
        ('ASC_AUTHENTIK_API_TOKEN="a"\nASC_OIDC_APP_PASS', "a", None),  # cut off
        ('ASC_AUTHENTIK_API_TOKEN="a"\nASC_OIDC_APP_PASSWORD="b', "a", None),
        ("ASC_AUTHENTIK_API_TOKEN=\nASC_OIDC_APP_PASSWORD=b\n", None, "b"),  # blank is not set
        (
            "export ASC_AUTHENTIK_API_TOKEN='a'\nASC_OIDC_APP_PASSWORD_EXPIRES_AT=soon\nASC_OIDC_APP_PASSWORD=b",
            "a",
            "b",
        ),
        ("\x00\x01\xff not a dotenv file", None, None),
    ],
)
def test_what_can_be_understood_of_a_broken_file_is_read(
    path: Path, text: str, api: str | None, app: str | None
) -> None:
    found = Credentials.read(write(path, text))
    assert found
    assert (found.api_token and found.api_token.value, found.app_password and found.app_password.value) == (api, app)
    assert found.renew_at(None, NOON) == NOON  # incomplete: at once


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o604, 0o620])
def test_a_file_that_others_can_read_or_write_is_refused_with_the_command_that_fixes_it(path: Path, mode: int) -> None:
    write(path, "ASC_OIDC_APP_PASSWORD=test-app-password\n", mode)
    with pytest.raises(UnsafeFileError, match=rf"mode {mode:04o}\). Close it:\n  chmod 600 ") as error:
        Credentials.read(path)
    assert "test-app-password" not in str(error.value)
    run_last_line(error.value)
    assert Credentials.read(path)


def run_last_line(error: Exception) -> None:
    """The command that the text ends with, run as a user would."""
    subprocess.run(["sh", "-c", str(error).splitlines()[-1]], check=True)


def test_a_symbolic_link_is_refused_with_the_command_that_fixes_it(path: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "it's elsewhere"
    PAIR.write(write(path, ""))
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(UnsafeFileError, match="is a symbolic link to") as error:
        Credentials.read(path)
    run_last_line(error.value)
    assert Credentials.read(path) == PAIR
    assert not elsewhere.exists()


def test_a_file_of_another_user_is_refused_with_the_command_that_fixes_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, "ASC_OIDC_APP_PASSWORD=test\n")
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)  # only root can give files away
    with pytest.raises(UnsafeFileError, match=r"belongs to another user \(uid \d+\)") as error:
        Credentials.read(path)
    run_last_line(error.value)
    assert Credentials.read(path) is None


def test_a_folder_or_a_pipe_in_its_place_is_refused(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(UnsafeFileError, match="is not a plain file"):
        Credentials.read(path)
    path.rmdir()
    os.mkfifo(path, 0o600)
    with pytest.raises(UnsafeFileError, match="is not a plain file"):
        Credentials.read(path)


def test_a_value_that_the_shell_would_change_is_not_kept(path: Path) -> None:
    PAIR.write(path)
    with pytest.raises(AccessError, match="ASC_AUTHENTIK_API_TOKEN has characters") as error:
        Credentials(api_token=Secret("a$(rm)b")).write(path)
    assert "rm" not in str(error.value)
    assert Credentials.read(path) == PAIR


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnsafeFileError, match=r"/file: File exists\. Check its folder"):
        PAIR.write(tmp_path / "file" / "auth.env")


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some homes on NFS."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    settings = access.settings_of(access.environment("https://127.0.0.1:1", tmp_path) | {"ASC_OIDC_APP_PASSWORD": "x"})
    with pytest.raises(UnsafeFileError, match=f"{settings.credentials_file}: No locks available"):
        refresh(settings)


@pytest.mark.parametrize(
    ("expires", "created", "skew_days", "due_before_end"),
    [
        (30.0, 0.0, None, 7.0),
        (30.0, None, None, 7.0),  # of dagster-slurm, which does not say when it was made
        (15.0, 0.0, None, 5.0),
        (30.0, 0.0, 3.0, 3.0),
        (30.0, 0.0, 29.0, 15.0),
        (30.0, None, 29.0, 29.0),
    ],
)
def test_when_a_secret_is_due(
    expires: float, created: float | None, skew_days: float | None, due_before_end: float
) -> None:
    made = None if created is None else NOON + timedelta(days=created)
    secret = Secret("x", "", NOON + timedelta(days=expires), made)
    assert secret.renew_at(skew_days) == NOON + timedelta(days=expires - due_before_end)


def test_a_folder_that_is_a_file_is_named(path: Path) -> None:
    """A run would take the bare OSError for a lost connection, and connect again."""
    path.parent.touch()
    with pytest.raises(UnsafeFileError, match=f"cannot be used: {path}: Not a directory. Check its folder"):
        Credentials.read(path)
