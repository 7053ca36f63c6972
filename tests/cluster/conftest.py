"""The simulated site for the tests: one for the whole run, in a clean state for each test."""

import os
from collections.abc import Iterator

import pytest

from tests.simulated_site import RequirementsError, SimulatedSite
from tests.simulated_site.requirements import check_system, installation_allowed

SITE_NAME = "pytest"


@pytest.fixture(scope="session")
def site_of_this_run() -> Iterator[SimulatedSite]:
    """Start the site, and remove it after the last test. Skip where it cannot run; with CI=true that is a failure."""
    try:
        check_system()
        SimulatedSite.down(SITE_NAME)  # what a run that was killed has left would run older code
        site = SimulatedSite.up(SITE_NAME, install=installation_allowed(asked=False))
    except RequirementsError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))
    try:
        yield site
    finally:
        SimulatedSite.down(SITE_NAME)


@pytest.fixture
def site(site_of_this_run: SimulatedSite) -> SimulatedSite:
    """The running site, with every fault of an earlier test mended, no jobs, empty homes and no tokens."""
    site_of_this_run.reset()
    return site_of_this_run
