"""Fixtures of the local tests."""

from support.forked_runs import *  # noqa: F403
from support.local_fixtures import *  # noqa: F403
