"""What runs by itself: credentials, orphaned jobs, old run directories, budgets."""

import dagster as dg

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.project import Project


def running_on_supercomputer(project: Project) -> dg.DefaultSensorStatus:
    """Return whether a sensor runs by default: on a supercomputer, or if the settings are wrong: its ticks say so."""
    try:
        runs = project.load_settings().on_supercomputer
    except ConfigurationError:
        runs = True
    return dg.DefaultSensorStatus.RUNNING if runs else dg.DefaultSensorStatus.STOPPED
