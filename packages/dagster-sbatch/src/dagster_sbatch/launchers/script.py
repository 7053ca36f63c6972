"""Start the workload as one process."""

import shlex
from collections.abc import Sequence
from typing import ClassVar

from dagster_sbatch.launchers.base import Launcher
from dagster_sbatch.slurm.request import SlurmRequest


class ScriptLauncher(Launcher):
    """Runs the workload as one process on the first node of the allocation.

    OMP_NUM_THREADS is the number of CPUs per task, unless the asset's `env` or the login shell sets it. Without it,
    libraries start one thread per hardware thread of the node.
    """

    key: ClassVar[str] = "script"

    def render(self, request: SlurmRequest, command: Sequence[str]) -> str:  # noqa: D102 - see Launcher
        lines = [self.render_threads(request), self.render_pre_start(), f"run_workload {shlex.join(command)}"]
        return "\n".join(filter(None, lines))
