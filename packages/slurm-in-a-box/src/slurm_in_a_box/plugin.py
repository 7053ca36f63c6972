"""A pytest plugin: the simulated site, one for the whole run, in a clean state for each test."""

import os
from collections.abc import Iterator

import pytest

from slurm_in_a_box.errors import RequirementsError
from slurm_in_a_box.requirements import installation_allowed
from slurm_in_a_box.site import SimulatedSite


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
    """The running site, without the faults of earlier tests, no jobs, empty homes and no tokens."""
    site_of_this_run.reset()
    return site_of_this_run
