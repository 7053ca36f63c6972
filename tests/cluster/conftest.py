"""Fixtures of the cluster tests."""

from support.cluster_fixtures import *  # noqa: F403
