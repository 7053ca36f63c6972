"""The interface of all launchers, and the plainest of them."""

import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field

from dagster_sbatch.errors import CheckedModel
from dagster_sbatch.launchers.container import Container
from dagster_sbatch.slurm.request import SlurmRequest


class Launcher(CheckedModel, ABC):
    """How a workload is started inside an allocation.

    A field that the asset leaves out has the site's value (SUPERCOMPUTER_SITE_OVERRIDES[site]["launchers"]), or its
    default.

    Raises:
        ConfigurationError: a field is unknown or has a wrong value.
    """

    key: ClassVar[str]
    """Name of the launcher in the site overrides."""
    not_in_arrays: ClassVar[str] = ""
    """Why it does not work in the tasks of a job array, and what to do instead; empty if it does."""
    runs_python: ClassVar[bool] = True
    """Whether its workloads are Python programs; then their syntax and their imports are checked before a run."""
    own_variables: ClassVar[frozenset[str]] = frozenset()
    """Variables that it sets for the workload; an asset cannot set them."""

    pre_start_commands: tuple[str, ...] = Field(
        (), description="Shell commands that every node of the job runs first. If one fails, stderr says so."
    )
    container: Container | None = Field(None, description="The image in which the workload runs; default: none.")

    def with_site(self, launchers: Mapping[str, Mapping[str, Any]]) -> Self:
        """Return this launcher with the site's values in the fields that the asset left out.

        Args:
            launchers: `Site.launchers`, by key.
        """
        return type(self)(**{**launchers.get(self.key, {}), **self.model_dump(exclude_unset=True)})

    def check_program(self, program: Path) -> None:
        """Refuse a program that this launcher cannot run.

        Args:
            program: the file on this machine; for a package its `__main__.py`.

        Raises:
            ConfigurationError: says what to change.
        """

    def complete_request(self, program: Path, request: SlurmRequest) -> tuple[SlurmRequest, list[str]]:  # noqa: ARG002
        """Return the request with what the program itself asks for, and notes for the run's log.

        Args:
            program: the file on this machine.
            request: as the asset wrote it; `model_fields_set` has the fields that it names.

        Raises:
            ConfigurationError: the program asks for what no job can have.
        """
        return request, []

    def local_environment(self) -> dict[str, str]:
        """Return the variables for a workload that runs on this machine."""
        return {}

    def local_command(self, request: SlurmRequest, command: Sequence[str]) -> list[str]:  # noqa: ARG002
        """Return the command that runs the workload on this machine, in the folder `work` of its run directory.

        Args:
            request: after `allocate`, if a site is known.
            command: as for `render`, with the program of this machine.
        """
        return [sys.executable, *command]

    def check(self, request: SlurmRequest) -> None:
        """Refuse a request in which this launcher cannot work.

        Args:
            request: after `allocate`.

        Raises:
            ConfigurationError: says what to change.
        """

    def files(self, request: SlurmRequest) -> dict[str, str]:  # noqa: ARG002
        """Return the files that its commands need, by name in the run directory.

        Args:
            request: after `allocate`.
        """
        return {}

    def hints(self, job: str) -> dict[str, str]:  # noqa: ARG002
        """Return commands with which people can look into a running job, by what they show."""
        return {}

    @abstractmethod
    def render(self, request: SlurmRequest, command: Sequence[str]) -> str:
        """Return the shell commands that run the workload inside the job.

        They can use two functions: `run_workload COMMAND...` starts the environment's Python as the workload, in a
        folder of its own, and `run_python COMMAND...` replaces its shell with another Python. Both set the variables of
        the asset's `env`. With a container, both run the Python of the image in it.
        `$run_directory` has what `files` returns; the task of an array runs in a folder below it.

        Args:
            request: after `allocate`.
            command: the program as the job sees it, or -m and a package; then the workload's own arguments.
        """

    @staticmethod
    def render_threads(request: SlurmRequest) -> str:
        """Return a line of bash that sets OMP_NUM_THREADS, unless it is set."""
        return f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{request.cpus_per_task or 1}}}"

    @staticmethod
    def step_options(request: SlurmRequest) -> list[str]:
        """Return the options of srun for a step that has the whole job.

        A step inherits neither CPUs nor GPUs from the job (Slurm 22.05 and later).

        Args:
            request: after `allocate`.
        """
        nodes, tasks, gpus = request.nodes, request.ntasks_per_node, request.gpus_per_node
        options = [f"--nodes={nodes}", f"--ntasks={nodes * tasks}", f"--ntasks-per-node={tasks}"]
        return [*options, f"--cpus-per-task={request.cpus_per_task or 1}", *([f"--gres=gpu:{gpus}"] if gpus else [])]

    def _render_process(self, request: SlurmRequest, command: str) -> str:
        """Return the shell commands that run the workload as one process; `command`: words of bash, for Python."""
        lines = [self.render_threads(request), self.render_pre_start(), f"run_workload {command}"]
        return "\n".join(filter(None, lines))

    def render_pre_start_function(self) -> str:
        """Return lines of bash that define the function `pre_start`, also for the shells that srun starts."""
        return f"pre_start() {{\n{self.render_pre_start() or ':'}\n}}\nexport -f pre_start\n"

    def render_pre_start(self) -> str:
        """Return the pre-start commands as lines of bash; each reports on stderr if it fails.

        `ulimit -n N` fails most often, because N is above the hard limit; it then sets the hard limit.
        """
        lines = []
        for command in self.pre_start_commands:
            fallback = "ulimit -n hard; " if command.startswith("ulimit -n ") else ""
            report = f'echo {shlex.quote(f"{command}: failed on")} "$HOSTNAME; the job continues" >&2'
            lines.append(f"eval {shlex.quote(command)} || {{ {fallback}{report}; }}")
        return "\n".join(lines)


class ScriptLauncher(Launcher):
    """Runs the workload as one process on the first node of the allocation.

    OMP_NUM_THREADS is the number of CPUs per task, unless the asset's `env` or the login shell sets it. Without it,
    libraries start one thread per hardware thread of the node.
    """

    key: ClassVar[str] = "script"

    def render(self, request: SlurmRequest, command: Sequence[str]) -> str:  # noqa: D102 - see Launcher
        return self._render_process(request, shlex.join(command))
