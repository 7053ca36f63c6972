"""Rotations that are killed, that run at the same time, or that cannot write: a working pair is always left."""

import errno
import os
import re
import signal
import stat
from pathlib import Path

import pytest

from dagster_sbatch.auth import AccessError, UnsafeFileError, refresh
from dagster_sbatch.auth.renew import refresh_lock
from dagster_sbatch.settings import Settings
from slurm_in_a_box import AuthentikControl, AuthentikServer
from support import access
from support.background import STRESS
from support.rotation import check_one_working_pair, stored
from support.rotation import later as later
from support.rotation import settings as settings
from support.rotation import variables as variables

pytestmark = pytest.mark.local
ROUNDS = 30 if STRESS else 1


def count_steps(variables: dict[str, str]) -> int:
    process = access.start(access.KILLED_AT_STEP, variables, "1000", "now", "no")
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return 1000 - int(out)


def test_a_kill_at_every_step_of_a_rotation_loses_nothing(
    later: Settings, variables: dict[str, str], control: AuthentikControl
) -> None:
    steps = count_steps(variables)
    assert steps > 15
    for step in range(steps):
        process = access.start(access.KILLED_AT_STEP, variables, str(step), "now", "no")
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        left = stored(later).app_password
        assert left and access.app_password_works(later, left.value), f"killed before step {step}"
        refresh(later, certificate="no")
        check_one_working_pair(later, control)
        leftovers = {path.name for path in later.credentials_file.parent.iterdir() if path.is_file()}
        assert leftovers <= {"musica-auth.env", "musica-auth.env.lock"}


def test_a_kill_at_every_step_of_a_bootstrap_is_repaired_by_the_next(
    authentik: AuthentikServer, tmp_path: Path, control: AuthentikControl
) -> None:
    def variables(name: str) -> dict[str, str]:
        (tmp_path / name).mkdir()
        token = {"ASC_AUTHENTIK_API_TOKEN": access.bootstrap_token(control)}
        return {**access.environment(authentik.base_url, tmp_path / name), **token}

    steps = count_steps(variables("whole"))
    control.delete_tokens(access.USER)
    for step in range(0, steps, 1 if STRESS else 3):
        chosen = variables(f"step-{step}")
        process = access.start(access.KILLED_AT_STEP, chosen, str(step), "now", "no")
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        refresh(access.settings_of(chosen), certificate="no")
        check_one_working_pair(access.settings_of(chosen), control)
        control.delete_tokens(access.USER)


REFRESH = """\
import sys
from resources import PROJECT
from dagster_sbatch.auth import refresh
settings = PROJECT.load_settings()
sys.stdin.readline()
print(refresh(settings, rotation=sys.argv[1], certificate="no").rotated_with)
"""


@pytest.mark.parametrize("when", ["due", "now"])
def test_eight_processes_at_once_end_with_one_working_pair(
    variables: dict[str, str], control: AuthentikControl, when: str
) -> None:
    for _ in range(ROUNDS):
        control.delete_tokens(access.USER)
        Path(variables["ASC_AUTHENTIK_CREDENTIALS_FILE"]).unlink(missing_ok=True)
        chosen = {**variables, "ASC_AUTHENTIK_API_TOKEN": access.bootstrap_token(control)}
        processes = [access.start(REFRESH, chosen, when) for _ in range(8)]
        said = access.release(processes)
        if when == "due":
            assert sorted(said) == ["None"] * 7 + ["bootstrap"]
        else:
            assert sorted(said) == ["bootstrap"] + ["stored"] * 7
        check_one_working_pair(access.settings_of(chosen), control)


def test_the_holder_of_the_lock_is_named(later: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dagster_sbatch.auth.renew.LOCK_SECONDS", 0.2)
    with (
        refresh_lock(later.credentials_file, 1),
        pytest.raises(AccessError, match=rf"more than 0 s: process {os.getpid()} \(.+\) on .+ since .+ UTC") as error,
    ):
        refresh(later, rotation="now", certificate="no")
    assert error.value.temporary
    refresh(later, rotation="now", certificate="no")


FULL_DISK = """\
import resource, signal, sys
sys.dont_write_bytecode = True  # Python would leave half a file, and read it the next time
from resources import PROJECT
from dagster_sbatch.auth import refresh
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # writing more fails, as on a full disk
refresh(PROJECT.load_settings(), rotation="now", certificate="no")
"""


def test_a_failure_to_write_leaves_the_old_file_and_no_stray(
    later: Settings, variables: dict[str, str], control: AuthentikControl
) -> None:
    before = later.credentials_file.read_text()
    process = access.start(FULL_DISK, variables)
    _, errors = process.communicate(timeout=60)
    assert re.search(r"UnsafeFileError: .*\S+/musica-auth\.env: File too large", errors)
    assert later.credentials_file.read_text() == before
    check_one_working_pair(later, control)


def test_a_file_system_that_cannot_sync_folders_will_do(
    later: Settings, control: AuthentikControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CIFS, in some versions of Linux."""
    fsync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    before = stored(later)
    assert refresh(later, rotation="now", certificate="no").rotated_with == "stored"
    assert check_one_working_pair(later, control).api_token != before.api_token


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_an_error_of_a_write_that_has_replaced_the_file_loses_nothing(
    later: Settings, control: AuthentikControl, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """As from a file server whose answer is lost: the rename has happened."""
    replace, renames = Path.replace, iter(range(1, 100))

    def replace_and_fail(path: Path, target: Path) -> Path:
        replaced = replace(path, target)
        if target == later.credentials_file and next(renames) == failing:
            raise OSError(errno.EIO, "Input/output error")
        return replaced

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace_and_fail)
        with pytest.raises(UnsafeFileError, match="Input/output error"):
            refresh(later, rotation="now", certificate="no")
    left = stored(later)
    assert left.api_token and access.api_token_works(later, left.api_token.value)
    assert left.app_password and access.app_password_works(later, left.app_password.value)
    refresh(later, rotation="now", certificate="no")
    check_one_working_pair(later, control)
