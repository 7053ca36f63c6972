"""Environments on the supercomputer: an interpreter, packages and the user's code, made once and never changed."""

from resources.environments.code import read_code, revision_of
from resources.environments.environments import (
    FOLDER,
    Comparison,
    Environment,
    EnvironmentListing,
    Environments,
    EnvironmentSpec,
)
from resources.environments.lock import CLUSTER, read_lock
from resources.environments.progress import LoggedProgress, Progress
from resources.environments.run import RunEnvironment

__all__ = [
    "CLUSTER",
    "FOLDER",
    "Comparison",
    "Environment",
    "EnvironmentListing",
    "EnvironmentSpec",
    "Environments",
    "LoggedProgress",
    "Progress",
    "RunEnvironment",
    "read_code",
    "read_lock",
    "revision_of",
]
