"""The environment of a run: staging makes what is missing, production runs only what was published."""

import shlex
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from dagster_sbatch.environments.code import read_code
from dagster_sbatch.environments.deployed import (
    Environment,
    Environments,
    EnvironmentSpec,
    Progress,
    Published,
    make_spec,
)
from dagster_sbatch.environments.groups import DEFAULT, is_path
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.run.plan import Plan
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm.gateway import Gateway

COMMAND = "scripts/deploy_environment.py"


class RunEnvironment:
    """Finds or makes the environment of a new job. A step that adopts an existing job does not need it.

    All but `check` raises ConfigurationError if git does not track the workload.
    """

    def __init__(self, gateway: Gateway, settings: Settings, plan: Plan) -> None:
        self._environments = Environments(gateway, str(settings.deployment_base_path), plan.site)
        self._settings, self._plan = settings, plan

    @property
    def inputs(self) -> dict[str, str]:
        """Digests of the code and the packages that a job would get, by name."""
        spec = self._spec
        code = {f"code {name}": digest for name, digest in spec.code.digests.items()}
        if spec.lock is None:
            return {**code, "environment": spec.python or ""}
        return {**code, "packages": spec.lock.digest, "SLURM_PYTHON": spec.python or ""}

    @property
    def request(self) -> Mapping[str, Any]:
        """The first request of `find`: which environment production runs; in staging, whether it exists."""
        if self._settings.deployment == "production_supercomputer":
            return self._environments.request_published(self._group)
        return self._environments.request_find(self._spec)

    def find(self, log: Callable[[str], object], answer: Mapping[str, Any] | None = None) -> Environment:
        """Return the environment; in staging, make it if it does not exist.

        Of an interpreter that the asset names, production compares the code with what was published, and puts that code
        beside the interpreter if this is its first use.

        `log`: called with what takes long, and with which files are not sent. `answer`: to `request`, if the login node
        has already answered that.
        Raises ConfigurationError: in production: it is not what was published.
        """
        for note in self._spec.code.notes:
            log(f"environment: {note}")
        deployment, environment = self._settings.deployment, self._plan.environment
        if deployment != "production_supercomputer":
            return self._environments.ensure(self._spec, Progress(log), answer)
        published = self._find_published(answer)
        differences = self._spec.differences_from(published.environment)
        if differences:
            listed = "".join(f"\n  {each}" for each in differences)
            workload, workloads = self._plan.workload, self._plan.project.workloads
            todo = f"Go back to what was published, with git, or publish what is here:\n{COMMAND}"
            if workload.root != workloads:
                todo = f"Only {workloads} is published. Move {workload.path} there."
            raise ConfigurationError(
                f"what is here is not what was published for {deployment} at {published.at:%Y-%m-%d %H:%M} UTC"
                f"{f' (revision {published.revision})' if published.revision else ''}:{listed}\n{todo}"
            )
        if is_path(environment):
            return self._environments.ensure(self._spec, Progress(log))
        return published.environment

    def check(self) -> None:
        """Check that a run would find its environment; make nothing, and do not compare the code.

        Raises ConfigurationError: in production: the packages have not been published.
        Raises RefusedError: the interpreter that the asset names cannot run workloads.
        """
        if self._settings.deployment == "production_supercomputer":
            self._find_published()
        if is_path(self._plan.environment):
            self._environments.check_interpreter(self._spec)

    @property
    def _group(self) -> str:
        return DEFAULT if is_path(self._plan.environment) else self._plan.environment or DEFAULT

    def _find_published(self, answer: Mapping[str, Any] | None = None) -> Published:
        """Return what production runs for the group of the asset, which must be published; `answer`: see `find`."""
        deployment, group = self._settings.deployment, self._group
        published = self._environments.published(group, answer)
        if published is None:
            what = f"environment {group!r} has not" if group else "nothing has"
            raise ConfigurationError(
                f"{what} been published for {deployment} yet. It runs only what was published. "
                f"Publish what is here:\n{COMMAND}"
            )
        return published

    @cached_property
    def _spec(self) -> EnvironmentSpec:
        workload, environment = self._plan.workload, self._plan.environment
        code, name = read_code(workload.root), workload.relative
        if name not in code.files:
            raise ConfigurationError(
                f"git does not track {workload.path}, and only what it tracks is sent to the supercomputer. "
                f"Add it:\ngit add {shlex.quote(str(workload.path))}"
            )
        if is_path(environment):
            return EnvironmentSpec(code, None, environment)
        return make_spec(self._plan.project, self._settings, code, environment)
