"""What runs by itself: credentials, orphaned jobs, old run directories, budgets."""

import dagster as dg

from dagster_sbatch.auth import AccessError, check_health
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.project import Project
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm.gateway import RefusedError
from dagster_sbatch.ssh import SshError

TICK_SECONDS = 40.0  # for the supercomputer to answer a sensor or a check; Dagster gives a tick 60
NO_ACCESS = (AccessError, SshError, RefusedError)  # errors of what asks the supercomputer


def running_on_supercomputer(project: Project) -> dg.DefaultSensorStatus:
    """Return whether a sensor runs by default: on a supercomputer; with wrong settings too, which its ticks report."""
    try:
        runs = project.load_settings().on_supercomputer
    except ConfigurationError:
        runs = True
    return dg.DefaultSensorStatus.RUNNING if runs else dg.DefaultSensorStatus.STOPPED


def wait_for_access(settings: Settings) -> str:
    """Return why a sensor does not connect now, empty if it does: the refresh job renews access, others only use it.

    A renewal that fails is not a reason while there is a valid certificate, or one can be requested all the same.
    """
    health = check_health(settings)
    return f"waits until access is in order: {health.summary}" if health.verdict in ("due", "broken") else ""
