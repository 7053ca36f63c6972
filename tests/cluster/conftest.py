"""The simulated site for the tests: one for the whole run, in a clean state for each test."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import paramiko
import pytest

from tests import access
from tests.simulated_site import CPU_PARTITION, RequirementsError, SimulatedSite, wait_until
from tests.simulated_site.requirements import installation_allowed


@pytest.fixture(scope="session")
def site_of_this_run() -> Iterator[SimulatedSite]:
    """Start the site, and remove it after the last test. Skip where it cannot run; with CI=true that is a failure."""
    try:
        with SimulatedSite.temporary(install=installation_allowed(asked=False)) as site:
            yield site
    except RequirementsError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


@pytest.fixture
def site(site_of_this_run: SimulatedSite) -> SimulatedSite:
    """The running site, with every fault of an earlier test repaired, no jobs, empty homes and no tokens."""
    site_of_this_run.reset()
    return site_of_this_run


@pytest.fixture
def client_home(site: SimulatedSite, tmp_path: Path) -> Path:
    """A home with the centre's line in known_hosts, and nothing else."""
    folder = tmp_path / "home"
    (folder / ".ssh").mkdir(parents=True, mode=0o700)
    shutil.copy(site.login.known_hosts, folder / ".ssh" / "known_hosts")
    return folder


@pytest.fixture
def on_supercomputer(site: SimulatedSite, client_home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """This process's environment is that of a `staging_supercomputer` deployment; the variables that were set."""
    variables = {**site.environment(), "SLURM_QOS": CPU_PARTITION, "HOME": str(client_home)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


@pytest.fixture
def shells_that_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent to a program on a login node until that has ended: what it was to be sent comes too late."""
    send = paramiko.Channel.send

    def send_late(channel: paramiko.Channel, data: bytes) -> int:
        wait_until(lambda: channel.closed, "the program has ended", 20)
        return int(send(channel, data))

    monkeypatch.setattr(paramiko.Channel, "send", send_late)


@pytest.fixture
def workloads(tmp_path: Path) -> Path:
    """A folder for them alone: all of it goes along."""
    folder = tmp_path / "workloads"
    folder.mkdir()
    return folder


@pytest.fixture
def variables(site: SimulatedSite) -> dict[str, str]:
    """The document's, with a bootstrap token."""
    site.authentik.set_lifetimes(token=30 * access.DAY)
    return site.environment()


@pytest.fixture
def without_secret(variables: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name != "ASC_AUTHENTIK_API_TOKEN"}
