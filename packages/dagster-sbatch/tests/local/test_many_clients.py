"""Many runs without a certificate ask authentik as seldom as one."""

import threading
from datetime import timedelta

import pytest

from dagster_sbatch.auth import AccessError, check_health, ensure_certificate
from dagster_sbatch.settings import Settings
from slurm_in_a_box import AuthentikControl, Disturbance
from support import access
from support.rotation import Wind
from support.rotation import later as later
from support.rotation import quick as quick
from support.rotation import settings as settings
from support.rotation import variables as variables
from support.rotation import wind as wind

pytestmark = [pytest.mark.local, pytest.mark.usefixtures("quick")]


@pytest.mark.parametrize("status", [400, 503])
def test_runs_that_connect_again_and_again_retry_together(
    later: Settings, control: AuthentikControl, wind: Wind, status: int
) -> None:
    """Thirteen runs follow their jobs; each connects again every minute."""
    control.disturb(Disturbance("error", status=status))
    for second in range(0, 600, 5):
        wind(timedelta(seconds=second))
        with pytest.raises(AccessError):
            ensure_certificate(later)
    assert check_health(later).failing["certificate"].count <= 5 + 10  # after 2, 4, 8, 16, 32 seconds, then 60
    control.clear_disturbances()
    wind(timedelta(seconds=660))
    with pytest.raises(AccessError, match=r"https://127\.0\.0\.1:1/root/"):  # the next link of the chain
        ensure_certificate(later)


def test_runs_that_wait_while_a_refresh_fails_fail_with_it(later: Settings, control: AuthentikControl) -> None:
    control.change_user(access.USER, active=False)
    ready = threading.Barrier(8)
    errors: list[str] = []

    def connect() -> None:
        ready.wait()
        try:
            ensure_certificate(later)
        except AccessError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=connect) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 8
    assert len({error.partition("\nThat was at ")[0] for error in errors}) == 1
    assert check_health(later).failing["certificate"].count == 1
