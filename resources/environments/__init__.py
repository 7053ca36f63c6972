"""Environments on the supercomputer: an interpreter, packages and own code, made once and never changed."""

from resources.environments.code import Code, read_code, revision_of
from resources.environments.environments import FOLDER, Comparison, Environment, Environments, Published, Row, Wanted
from resources.environments.lock import CLUSTER, read_lock
from resources.environments.progress import LoggedProgress, Progress
from resources.environments.retention import choose_for_removal
from resources.environments.run import RunEnvironment, differences_from

__all__ = [
    "CLUSTER",
    "FOLDER",
    "Code",
    "Comparison",
    "Environment",
    "Environments",
    "LoggedProgress",
    "Progress",
    "Published",
    "Row",
    "RunEnvironment",
    "Wanted",
    "choose_for_removal",
    "differences_from",
    "read_code",
    "read_lock",
    "revision_of",
]
