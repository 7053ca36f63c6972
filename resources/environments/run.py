"""The environment of a run: made on demand in staging, only what was published in production."""

import shlex
from collections.abc import Callable
from functools import cached_property

from resources.environments.code import read_code
from resources.environments.environments import Environment, Environments, Published, Wanted
from resources.environments.lock import CLUSTER, read_lock
from resources.environments.progress import LoggedProgress
from resources.errors import ConfigurationError
from resources.settings import Settings
from resources.workload import Workload

COMMAND = "scripts/deploy_environment.py"
MOST_NAMES = 5


class RunEnvironment:
    """The environment of a run; an adopted job does without."""

    def __init__(self, environments: Environments, settings: Settings, workload: Workload) -> None:
        """Nothing is read yet.

        Args:
            environments: of the deployment.
            settings: say which deployment it is, and whether it has an interpreter of its own.
            workload: its code root is the own code.
        """
        self._environments, self._settings, self._workload = environments, settings, workload
        self._published_only = settings.deployment == "production_supercomputer"

    @property
    def inputs(self) -> dict[str, str]:
        """Digests of the code and the packages that a job would get, by name.

        Raises:
            ConfigurationError: the workload is not part of the code.
        """
        code = {f"code {name}": digest for name, digest in self._wanted.code.digests.items()}
        return {**code, "packages": self._wanted.lock.digest, "SLURM_PYTHON": self._wanted.python or ""}

    def find(self, log: Callable[[str], None]) -> Environment:
        """Find it, or make it where that is allowed; at most one round trip if it is there.

        Args:
            log: is told what takes long, and what stays here.

        Raises:
            ConfigurationError: the workload is not part of the code; or in production: not what was published.
        """
        wanted = self._wanted
        for note in wanted.code.notes:
            log(f"environment: {note}")
        if not self._published_only:
            return self._environments.ensure(wanted, LoggedProgress(log))
        published, deployment = self._environments.published(), self._settings.deployment
        if published is None:
            raise ConfigurationError(f"nothing has been published for {deployment} yet: {COMMAND} does that")
        differences = differences_from(published, wanted)
        if differences:
            listed = "".join(f"\n  {each}" for each in differences)
            raise ConfigurationError(
                f"what is here is not what was published for {deployment} at {published.at:%Y-%m-%d %H:%M} UTC"
                f"{f' (revision {published.revision})' if published.revision else ''}:{listed}\n"
                f"Publish what is here: {COMMAND}. Or go back to what was published, with git."
            )
        return published.environment

    @cached_property
    def _wanted(self) -> Wanted:
        code, name = read_code(self._workload.root), self._workload.relative
        if name not in code.files:
            raise ConfigurationError(
                f"git does not track {self._workload.path}, and only what it tracks is sent:\n"
                f"git add {shlex.quote(str(self._workload.path))}"
            )
        return Wanted(code, read_lock(CLUSTER), self._settings.python)


def differences_from(published: Published, wanted: Wanted) -> list[str]:
    """What of the lock, the interpreter and the code is not as it was published, in words."""
    environment, found = published.environment, []
    if environment.asked != wanted.python:
        found.append(f"SLURM_PYTHON: {wanted.python or 'not set'}, was {environment.asked or 'not set'}")
    elif environment.lock not in (None, wanted.lock.digest):
        found.append(f"{wanted.lock.path.name}: other packages")
    here, there = wanted.code.digests, environment.code
    names = [name for name in sorted({*here, *there}) if here.get(name) != there.get(name)]
    for name in names[:MOST_NAMES]:
        how = "is new" if name not in there else "is gone" if name not in here else "is changed"
        found.append(f"{wanted.code.folder / name} {how}")
    if len(names) > MOST_NAMES:
        found.append(f"and {len(names) - MOST_NAMES} more files")
    return found
