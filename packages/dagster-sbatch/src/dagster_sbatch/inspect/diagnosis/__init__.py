"""Checks everything between the settings and the jobs on the supercomputer; stops at what keeps jobs from running."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import dagster as dg

from dagster_sbatch.auth import AccessError
from dagster_sbatch.inspect.asset_preview import find_submitting
from dagster_sbatch.inspect.diagnosis import login_node, slurm_jobs, this_machine
from dagster_sbatch.inspect.diagnosis.finding import Facts, Finding, broken
from dagster_sbatch.project import Project
from dagster_sbatch.slurm.gateway import RefusedError, StoppedError
from dagster_sbatch.ssh import SshError

CHECKS: dict[str, Callable[[Facts], Finding]] = {
    "settings": this_machine.check_settings,
    "Dagster's home": this_machine.check_dagster_home,
    "credentials": this_machine.check_credentials,
    "certificate": this_machine.check_certificate,
    "name": this_machine.check_name,
    "port": this_machine.check_port,
    "host authority": this_machine.check_host_authority,
    "login": login_node.check_login,
    "Slurm": login_node.check_slurm,
    "partitions": login_node.check_partitions,
    "storage": login_node.check_storage,
    "deployment folder": login_node.check_folder,
    "projects": slurm_jobs.check_projects,
    "temporary folder": login_node.check_temporary_folder,
    "open files": login_node.check_open_files,
    "locks": slurm_jobs.check_locks,
    "jobs": slurm_jobs.check_jobs,
    "environment": slurm_jobs.check_environment,
}
"""In this order; each may use what those before it have put into the facts."""
OVER_SSH = ("credentials", "certificate", "name", "port", "host authority")
"""Not made where Dagster runs on the login node."""


def examine(
    project: Project,
    definitions: dg.Definitions | None = None,
    open_instance: Callable[[], dg.DagsterInstance] = dg.DagsterInstance.get,
) -> Iterator[tuple[str, Finding]]:
    """Make one check after the other, and stop after the first one that is broken. Yield name and result of each.

    The last checks ask Slurm about the job scripts of the assets; none of these stops the others.

    `definitions`: of the code location; None: no job scripts are tried. `open_instance`: opens the Dagster instance
    whose runs this project's jobs belong to.
    """
    with ExitStack() as until_the_end:
        facts = Facts(project, open_instance, until_the_end)
        for name, check in CHECKS.items():
            if name in OVER_SSH and facts.settings.on_login_node:
                continue
            finding = make(check, facts)
            yield name, finding
            if finding.state == "broken":
                return
        definitions = definitions or dg.Definitions()
        for asset, partition in find_submitting(definitions, facts.instance):
            yield f"asset {asset}", make(slurm_jobs.check_job_script, facts, definitions, asset, partition)


def make(check: Callable[..., Finding], *arguments: Any) -> Finding:
    """Return what a check finds; `broken` if the login node cannot be reached or refuses the request."""
    try:
        return check(*arguments)
    except (AccessError, SshError, RefusedError, StoppedError) as error:
        text = str(error) or f"the login node has not answered everything within {login_node.SECONDS:.0f} s"
        return broken(text, "do what the error says; if it says nothing to do, try again")
