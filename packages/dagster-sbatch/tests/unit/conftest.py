"""Fixtures of the unit tests."""

from support.agent_fixtures import *  # noqa: F403
