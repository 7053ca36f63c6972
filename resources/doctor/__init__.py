"""Checks everything between the settings and the jobs on the supercomputer, and stops at what keeps jobs from running.

finding    what a check says, and what is known so far
here       checks on this machine, and of the way to the login node
there      checks on the login node; survey asks it everything over one SSH channel
locks      the check of locks, over connections to two login nodes
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import dagster as dg

from resources.doctor import here, locks, there
from resources.doctor.finding import Facts, Finding, Verdict

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
    "account and QoS": there.check_account,
    "deployment folder": there.check_folder,
    "Python": there.check_python,
    "temporary folder": there.check_temporary_folder,
    "open files": there.check_open_files,
    "locks": locks.check_locks,
    "jobs": there.check_jobs,
    "environment": there.check_environment,
}
"""In this order; each may use what those before it have put into the facts."""


def examine(
    site_overrides: Mapping[str, Any], open_instance: Callable[[], dg.DagsterInstance] = dg.DagsterInstance.get
) -> Iterator[Finding]:
    """Make one check after the other, and stop after the first one that is broken.

    Args:
        site_overrides: SUPERCOMPUTER_SITE_OVERRIDES.
        open_instance: opens the Dagster instance whose runs this project's jobs belong to.
    """
    with ExitStack() as until_the_end:
        facts = Facts(site_overrides, open_instance, until_the_end)
        for name, check in CHECKS.items():
            finding = Finding(name, *check(facts))
            yield finding
            if finding.state == "broken":
                return
