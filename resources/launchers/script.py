"""A Python program, started once."""

import shlex
from typing import ClassVar

from resources.launchers.base import Launcher, render_pre_start
from resources.slurm.request import SlurmRequest


class ScriptLauncher(Launcher):
    """Runs the workload as one process on the first node of the allocation."""

    key: ClassVar[str] = "script"

    def render(self, request: SlurmRequest, workload: str) -> str:  # noqa: ARG002, D102 - see Launcher
        return f"{render_pre_start(self.pre_start_commands)}\nrun_workload {shlex.quote(workload)}".lstrip()
