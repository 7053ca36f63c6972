"""Environments on the supercomputer: an interpreter, packages and the user's code, made once and never changed."""

from dagster_sbatch.environments.code import read_code, revision_of
from dagster_sbatch.environments.deployed import (
    FOLDER,
    Comparison,
    Environment,
    EnvironmentListing,
    Environments,
    EnvironmentSpec,
)
from dagster_sbatch.environments.lockfile import read_lock
from dagster_sbatch.environments.progress import LoggedProgress, Progress

__all__ = [
    "FOLDER",
    "Comparison",
    "Environment",
    "EnvironmentListing",
    "EnvironmentSpec",
    "Environments",
    "LoggedProgress",
    "Progress",
    "read_code",
    "read_lock",
    "revision_of",
]
