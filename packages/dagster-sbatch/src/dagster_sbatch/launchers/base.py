"""What all launchers have in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dagster_sbatch.errors import ConfigurationError, describe
from dagster_sbatch.slurm.request import SlurmRequest


class Launcher(BaseModel, ABC):
    """How a workload is started inside an allocation.

    A field that the asset leaves out comes from the site (SUPERCOMPUTER_SITE_OVERRIDES[site]["launchers"]), else it has
    its default.

    Raises:
        ConfigurationError: a field is unknown or has a wrong value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    key: ClassVar[str]
    """Names the launcher in the site overrides."""

    pre_start_commands: tuple[str, ...] = Field(
        (),
        description="Shell commands on every node of the job, first; one that fails is told and passed over.",
    )

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigurationError(describe(error, type(self).__name__, type(self).model_fields)) from None

    def with_site(self, launchers: Mapping[str, Mapping[str, Any]]) -> Self:
        """This launcher, its open fields filled from the site, field by field.

        Args:
            launchers: `Site.launchers`, by key.
        """
        return type(self)(**{**launchers.get(self.key, {}), **self.model_dump(exclude_unset=True)})

    def local_environment(self) -> dict[str, str]:
        """Variables for a workload that runs on this machine."""
        return {}

    def check(self, request: SlurmRequest) -> None:
        """Refuse a request (after `allocate`) in which this launcher cannot work.

        Raises:
            ConfigurationError: with what to change.
        """

    def files(self, request: SlurmRequest) -> dict[str, str]:  # noqa: ARG002
        """Files that its commands need, by name in the run directory.

        Args:
            request: after `allocate`.
        """
        return {}

    def hints(self, job: str) -> dict[str, str]:  # noqa: ARG002
        """Commands for people who look at a running job, by what they show."""
        return {}

    @abstractmethod
    def render(self, request: SlurmRequest, command: Sequence[str]) -> str:
        """The shell commands that run the workload inside the job.

        `run_workload COMMAND...` starts the environment's Python as the workload, `run_python COMMAND...` becomes one
        beside it; both have the variables that the asset names.

        Args:
            request: after `allocate`.
            command: Python's arguments: the program as the job sees it, or -m and a package; then the workload's own.
        """


def render_pre_start(commands: tuple[str, ...]) -> str:
    """The pre-start commands, each followed by a word on stderr if it fails.

    `ulimit -n N` above the hard limit is what fails most: then the hard limit is taken.
    """
    lines = []
    for command in commands:
        fallback = 'ulimit -n "$(ulimit -Hn)"; ' if command.startswith("ulimit -n ") else ""
        told = command.replace("'", "'\\''")
        lines.append(f"{command} || {{ {fallback}echo '{told}: refused on '\"$HOSTNAME\"', going on' >&2; }}")
    return "\n".join(lines)
