"""Fixtures of the unit tests."""

from support.agent_fixtures import *  # noqa: F403
from support.array_site import *  # noqa: F403
