"""Run a program of any language: a binary, a script whose first line names its interpreter, or a batch script."""

import codecs
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.launchers.base import Launcher
from dagster_sbatch.launchers.command.job.run_program import FOREIGN
from dagster_sbatch.slurm.request import SlurmRequest
from dagster_sbatch.slurm.script_request import complete_request

_BINARIES = (b"\x7fELF", *FOREIGN)
"""First bytes of programs, those for other systems included: the job says which one it was built for."""
_FIRST_LINE = re.compile(rb"#![ \t]*/")
_FOLDER = Path(__file__).parent / "job"
_PROGRAMS = ("run_program.py", "pipes_command.py")
_THERE = "program"  # folder of these programs in the run directory
_FILES = {f"{_THERE}/{name}": (_FOLDER / name).read_text() for name in _PROGRAMS}


class CommandLauncher(Launcher):
    """Runs the workload as a program of any language, on the first node of the allocation.

    The workload is a binary, or a script with a first line such as `#!/usr/bin/env Rscript`; it must be executable. Its
    exit code decides about success. It may report by the command `pipes`, which is on its PATH:
    `pipes materialize --metadata rows=12 --metadata plot=@plot.png`. OMP_NUM_THREADS is as with ScriptLauncher.

    Example:
        compute.run(context, workload=WORKLOADS / "model.sh", launcher=CommandLauncher(), args=["--steps", "100"])
    """

    key: ClassVar[str] = "command"
    runs_python: ClassVar[bool] = False
    options: ClassVar[tuple[str, ...]] = ()
    """Options of run_program.py."""

    def check_program(self, program: Path) -> None:  # noqa: D102 - see Launcher
        _check_text(program)
        if not os.access(program, os.X_OK):
            raise ConfigurationError(
                f"{program} is not executable. Permit it, and let git record that:\n"
                f"chmod +x {shlex.quote(str(program))}"
            )
        with program.open("rb") as file:
            head = file.read(1024)
        if head.startswith(_BINARIES) or _FIRST_LINE.match(head):
            return
        if b"\0" in head or not head:
            raise ConfigurationError(
                f"{program} is not a program: it is {'data' if head else 'empty'}, neither a binary nor a script. "
                "Name the program as the workload, and pass this file in args."
            )
        raise ConfigurationError(
            f"{program} is a script, and its first line does not name its interpreter. "
            "Begin it with a line such as #!/bin/bash or #!/usr/bin/env Rscript"
        )

    def local_command(self, request: SlurmRequest, command: Sequence[str]) -> list[str]:  # noqa: ARG002, D102 - see Launcher
        return [sys.executable, str(_FOLDER / _PROGRAMS[0]), *self.options, *command]

    def files(self, request: SlurmRequest) -> dict[str, str]:  # noqa: ARG002, D102 - see Launcher
        return dict(_FILES)

    def render(self, request: SlurmRequest, command: Sequence[str]) -> str:  # noqa: D102 - see Launcher
        program = f'"$run_directory/{_THERE}/{_PROGRAMS[0]}"'
        return self._render_process(request, f"{program} {shlex.join([*self.options, *command])}")


class BatchScriptLauncher(CommandLauncher):
    """Runs the workload as the batch script that it is, unchanged.

    The script's #SBATCH lines apply unless the asset's request has another value; the run's log names lines that do not
    apply. The script succeeds if its exit code is 0. It may report with the command `pipes`, as with CommandLauncher.
    It runs in a folder with links to the files that lie beside the script; SLURM_SUBMIT_DIR is this folder. With a
    container, the whole script runs in the image, which has neither srun nor module.

    Example:
        compute.run(context, workload=WORKLOADS / "relax.sbatch", launcher=BatchScriptLauncher())
    """

    key: ClassVar[str] = "batch_script"
    options: ClassVar[tuple[str, ...]] = ("--batch-script",)

    def check_program(self, program: Path) -> None:  # noqa: D102 - see Launcher
        _check_text(program)
        if not _FIRST_LINE.match(program.read_bytes()):
            raise ConfigurationError(
                f"{program} does not begin with #! and the path of an interpreter, so sbatch would refuse it. "
                "Begin it with a line such as #!/bin/bash"
            )

    def complete_request(self, program: Path, request: SlurmRequest) -> tuple[SlurmRequest, list[str]]:  # noqa: D102 - see Launcher
        return complete_request(request, program.read_text(errors="replace"), program.name)


def _check_text(script: Path) -> None:
    """Refuse a script as editors of Windows save it: with CRLF, or with a byte order mark."""
    content = script.read_bytes()
    if content.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ConfigurationError(
            f"{script} begins with a byte order mark, with which it does not run on Linux. "
            "Save it as UTF-8 without a byte order mark."
        )
    if content.startswith(b"#!") and b"\r\n" in content and b"\0" not in content:  # a zipapp is a script and data
        raise ConfigurationError(
            f"{script} has the line ends of Windows (CRLF), with which it does not run on Linux. Convert it:\n"
            f"sed -i 's/\\r$//' {shlex.quote(str(script))}"
        )
