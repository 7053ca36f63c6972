"""Run a batch script that was written for sbatch."""

from pathlib import Path
from typing import ClassVar

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.launchers.command import FIRST_LINE, CommandLauncher, check_text
from dagster_sbatch.slurm.request import SlurmRequest
from dagster_sbatch.slurm.script_request import complete_request


class BatchScriptLauncher(CommandLauncher):
    """Runs the workload as the batch script that it is, unchanged.

    Its #SBATCH lines apply where the asset's request says nothing; the run's log names those that do not apply. The
    exit code of the script decides about success, and it may report by the command `pipes`, as with CommandLauncher. It
    runs in a folder of the run that has links to the files beside the script; SLURM_SUBMIT_DIR is that folder. With a
    container, all of it runs in the image, which has neither srun nor module.

    Example:
        compute.run(context, workload=WORKLOADS / "relax.sbatch", launcher=BatchScriptLauncher())
    """

    key: ClassVar[str] = "batch_script"
    options: ClassVar[tuple[str, ...]] = ("--batch-script",)

    def check_program(self, program: Path) -> None:  # noqa: D102 - see Launcher
        check_text(program)
        if not FIRST_LINE.match(program.read_bytes()):
            raise ConfigurationError(
                f"{program} does not begin with #! and the path of an interpreter, so sbatch would refuse it. "
                "Begin it with a line such as #!/bin/bash"
            )

    def complete_request(self, program: Path, request: SlurmRequest) -> tuple[SlurmRequest, list[str]]:  # noqa: D102 - see Launcher
        return complete_request(request, program.read_text(errors="replace"), program.name)
