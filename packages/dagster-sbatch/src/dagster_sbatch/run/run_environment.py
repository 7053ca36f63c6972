"""The environment of a run: staging makes what is missing, production runs only what was published."""

import shlex
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from dagster_sbatch.environments.code import read_code
from dagster_sbatch.environments.deployed import Environment, Environments, EnvironmentSpec
from dagster_sbatch.environments.lockfile import read_lock
from dagster_sbatch.environments.progress import LoggedProgress
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.run.workload import Workload
from dagster_sbatch.settings import Settings

COMMAND = "scripts/deploy_environment.py"


class RunEnvironment:
    """Finds or makes the environment of a new job. A step that adopts an existing job does not need it."""

    def __init__(self, environments: Environments, settings: Settings, workload: Workload, lock: Path) -> None:
        """Store the arguments; the code and the lock file are read when they are needed.

        Args:
            environments: of the deployment.
            settings: name the deployment, and its SLURM_PYTHON.
            workload: its code root is the user's code.
            lock: the locked packages.
        """
        self._environments, self._settings, self._workload, self._lock = environments, settings, workload, lock

    @property
    def inputs(self) -> dict[str, str]:
        """Digests of the code and the packages that a job would get, by name.

        Raises:
            ConfigurationError: git does not track the workload.
        """
        code = {f"code {name}": digest for name, digest in self._spec.code.digests.items()}
        return {**code, "packages": self._spec.lock.digest, "SLURM_PYTHON": self._spec.python or ""}

    def find(self, log: Callable[[str], None]) -> Environment:
        """Return the environment; in staging, make it if it does not exist. One round trip if it exists.

        Args:
            log: called with what takes long, and with which files are not sent.

        Raises:
            ConfigurationError: git does not track the workload; or in production: it is not what was published.
        """
        for note in self._spec.code.notes:
            log(f"environment: {note}")
        deployment = self._settings.deployment
        if deployment != "production_supercomputer":
            return self._environments.ensure(self._spec, LoggedProgress(log))
        published = self._environments.published()
        if published is None:
            raise ConfigurationError(
                f"nothing has been published for {deployment} yet. It runs only what was published. Publish what is "
                f"here:\n{COMMAND}"
            )
        differences = self._spec.differences_from(published.environment)
        if differences:
            listed = "".join(f"\n  {each}" for each in differences)
            raise ConfigurationError(
                f"what is here is not what was published for {deployment} at {published.at:%Y-%m-%d %H:%M} UTC"
                f"{f' (revision {published.revision})' if published.revision else ''}:{listed}\n"
                f"Go back to what was published, with git, or publish what is here:\n{COMMAND}"
            )
        return published.environment

    @cached_property
    def _spec(self) -> EnvironmentSpec:
        code, name = read_code(self._workload.root), self._workload.relative
        if name not in code.files:
            raise ConfigurationError(
                f"git does not track {self._workload.path}, and only what it tracks is sent to the supercomputer. "
                f"Add it:\ngit add {shlex.quote(str(self._workload.path))}"
            )
        return EnvironmentSpec(code, read_lock(self._lock), self._settings.python)
