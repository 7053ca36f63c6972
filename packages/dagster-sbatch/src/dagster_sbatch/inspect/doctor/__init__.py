"""Checks everything between the settings and the jobs on the supercomputer; stops at what keeps jobs from running."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import dagster as dg

from dagster_sbatch.auth import AccessError
from dagster_sbatch.inspect.doctor import here, jobs, there
from dagster_sbatch.inspect.doctor.finding import Facts, Finding, Verdict, broken
from dagster_sbatch.inspect.preview import find_submitting
from dagster_sbatch.project import Project
from dagster_sbatch.slurm.gateway import RefusedError, StoppedError
from dagster_sbatch.ssh import SshError

__all__ = ["CHECKS", "Finding", "examine"]

CHECKS: dict[str, Callable[[Facts], Verdict]] = {
    "settings": here.check_settings,
    "Dagster's home": here.check_dagster_home,
    "credentials": here.check_credentials,
    "certificate": here.check_certificate,
    "name": here.check_name,
    "port": here.check_port,
    "host authority": here.check_host_authority,
    "login": there.check_login,
    "Slurm": there.check_slurm,
    "partitions": there.check_partitions,
    "storage": there.check_storage,
    "deployment folder": there.check_folder,
    "Python": there.check_python,
    "projects": jobs.check_projects,
    "temporary folder": there.check_temporary_folder,
    "open files": there.check_open_files,
    "locks": jobs.check_locks,
    "jobs": jobs.check_jobs,
    "environment": jobs.check_environment,
}
"""In this order; each may use what those before it have put into the facts."""


def examine(
    project: Project,
    definitions: dg.Definitions | None = None,
    open_instance: Callable[[], dg.DagsterInstance] = dg.DagsterInstance.get,
) -> Iterator[Finding]:
    """Make one check after the other, and stop after the first one that is broken.

    The last checks ask Slurm about the job scripts of the assets; none of these stops the others.

    Args:
        project: the code location.
        definitions: of the code location; None: no job scripts are tried.
        open_instance: opens the Dagster instance whose runs this project's jobs belong to.
    """
    with ExitStack() as until_the_end:
        facts = Facts(project, open_instance, until_the_end)
        for name, check in CHECKS.items():
            finding = Finding(name, *make(check, facts))
            yield finding
            if finding.state == "broken":
                return
        definitions = definitions or dg.Definitions()
        for asset, partition in find_submitting(definitions, facts.instance):
            yield Finding(f"asset {asset}", *make(jobs.check_job_script, facts, definitions, asset, partition))


def make(check: Callable[..., Verdict], *arguments: Any) -> Verdict:
    """Return the verdict of a check; `broken` if the login node cannot be reached or refuses the request."""
    try:
        return check(*arguments)
    except (AccessError, SshError, RefusedError, StoppedError) as error:
        text = str(error) or f"the login node has not answered everything within {jobs.SECONDS:.0f} s"
        return broken(text, "do what the error says; if it says nothing to do, try again")
