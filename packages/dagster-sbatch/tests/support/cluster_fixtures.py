"""A user of the simulated site, and a deployment on it."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import paramiko
import pytest

from slurm_in_a_box import CPU_PARTITION, SimulatedSite, wait_until
from support import access
from support.step import kill_all


@pytest.fixture(autouse=True)
def steps_end_with_their_test() -> Iterator[None]:
    """That of a test which has failed would use the next test's access."""
    yield
    kill_all()


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
def step_variables(on_supercomputer: dict[str, str]) -> dict[str, str]:
    """The environment of a `Step` in that deployment."""
    return {**{name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}, **on_supercomputer}


@pytest.fixture
def shells_that_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent to a program on a login node until that has ended: what it was to be sent comes too late."""
    send = paramiko.Channel.send

    def send_late(channel: paramiko.Channel, data: bytes) -> int:
        wait_until(lambda: channel.closed, "the program has ended")
        return int(send(channel, data))

    monkeypatch.setattr(paramiko.Channel, "send", send_late)


@pytest.fixture
def workloads(tmp_path: Path) -> Path:
    """A folder for workloads alone: everything in it is sent."""
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
