"""Checks everything between the settings and the jobs on the supercomputer, and stops at what keeps jobs from running.

finding    what a check says, and what is known so far
here       checks on this machine, and of the way to the login node
there      checks on the login node; survey asks it everything over one SSH channel
locks      the check of locks, over connections to two login nodes
jobs       checks over one connection to the agent there: projects, jobs, what Slurm says to each asset's job script
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import dagster as dg

from dagster_sbatch.inspect.doctor import here, jobs, locks, there
from dagster_sbatch.inspect.doctor.finding import Facts, Finding, Verdict
from dagster_sbatch.project import Project

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
    "locks": locks.check_locks,
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

    The last ones are about the job scripts of the assets; all of these are made.

    Args:
        project: the code location.
        definitions: of the code location; None: no job scripts are tried.
        open_instance: opens the Dagster instance whose runs this project's jobs belong to.
    """
    with ExitStack() as until_the_end:
        facts = Facts(project, open_instance, until_the_end, definitions)
        for name, check in CHECKS.items():
            finding = Finding(name, *check(facts))
            yield finding
            if finding.state == "broken":
                return
        for name, verdict in jobs.try_job_scripts(facts):
            yield Finding(name, *verdict)
