"""Modules in `development`: Lmod loads them, if this machine has it; otherwise the workload runs without them."""

import os
import subprocess
from collections.abc import Sequence

from dagster_sbatch.children import child_environment
from dagster_sbatch.run.reports import StepLog
from dagster_sbatch.slurm.modules import shorten_error

_LMOD = "LMOD_CMD"  # Lmod sets it in every shell in which `module` works
_STATE = ("LMOD_", "__LMOD_", "MODULE", "_ModuleTable", "LOADEDMODULES", "_LMFILES_")
"""Beginnings of the names of Lmod's own variables."""
_LOAD = 'set -e; eval "$("$LMOD_CMD" bash load "$@")" >&2; env -0'  # a module may print
_SHELLS = ("PWD", "OLDPWD", "SHLVL", "_")


def load_modules(modules: Sequence[str], log: StepLog) -> dict[str, str]:
    """Return the variables that modules set or change on this machine.

    The log says if they cannot be loaded: laptops have no Lmod, and other machines have other modules.
    """
    if not modules:
        return {}
    names = ", ".join(modules)
    if _LMOD not in os.environ:
        log.info(
            f"These modules are not loaded: {names}. This machine has no Lmod. "
            "The workload uses the programs that it finds on the PATH."
        )
        return {}
    before = child_environment(*(name for name in os.environ if name.startswith(_STATE)))
    done = subprocess.run(
        ["bash", "-c", _LOAD, "bash", *modules], env=before, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    if done.returncode:
        log.warning(
            f"Lmod on this machine could not load the modules {names}. "
            f"{shorten_error(done.stderr.decode(errors='replace'))}\nThe workload runs without them."
        )
        return {}
    after = dict(line.partition("=")[::2] for line in os.fsdecode(done.stdout).split("\0") if line)
    # As in a job, Python does not get the variables of a module's Python.
    return {
        name: value
        for name, value in after.items()
        if before.get(name) != value and name not in _SHELLS and not name.startswith("PYTHON")
    }
