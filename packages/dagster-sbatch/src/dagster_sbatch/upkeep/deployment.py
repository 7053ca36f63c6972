"""What all sensors of the supercomputer have in common."""

import dagster as dg

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.project import Project
from dagster_sbatch.settings import Settings


def supercomputer_settings(project: Project) -> Settings:
    """The settings of the supercomputer, also where the deployment is `development`.

    Raises:
        ConfigurationError: see `load_settings`.
    """
    return project.load_settings(supercomputer=True)


def running_on_supercomputer(project: Project) -> dg.DefaultSensorStatus:
    """Whether such a sensor runs by itself. Wrong settings count as a supercomputer's: its ticks fail with them."""
    try:
        runs = project.load_settings().on_supercomputer
    except ConfigurationError:
        runs = True
    return dg.DefaultSensorStatus.RUNNING if runs else dg.DefaultSensorStatus.STOPPED
