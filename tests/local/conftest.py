"""Fixtures of the local tests."""

from support.local_fixtures import *  # noqa: F403
