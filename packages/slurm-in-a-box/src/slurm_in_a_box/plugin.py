"""The pytest plugin: the fixture `slurm_site`."""

import os
from collections.abc import Iterator

import pytest

from .command_line import PROGRAM
from .errors import NotInstalledError, RequirementsError
from .requirements import installation_allowed
from .site import SimulatedSite


@pytest.fixture(scope="session")
def running_slurm_site() -> Iterator[SimulatedSite]:
    """Start a site for this process, and remove it after the last test. What earlier tests did is still on it.

    Where the site cannot run, its tests are skipped; with CI=true they fail.
    """
    try:
        with SimulatedSite.temporary(install=installation_allowed(asked=False)) as site:
            yield site
    except RequirementsError as error:
        if os.environ.get("CI") == "true":
            raise
        hint = f"; `{PROGRAM} up --install` installs it" if isinstance(error, NotInstalledError) else ""
        pytest.skip(f"{error}{hint}")


@pytest.fixture
def slurm_site(running_slurm_site: SimulatedSite) -> SimulatedSite:
    """Return the running site after a reset: no faults, jobs, processes of users, files of users or tokens."""
    running_slurm_site.reset()
    return running_slurm_site
