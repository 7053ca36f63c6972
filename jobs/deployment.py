"""What all sensors of the supercomputer have in common."""

import dagster as dg

from resources import SUPERCOMPUTER_SITE_OVERRIDES
from resources.errors import ConfigurationError
from resources.settings import Settings, load_settings


def supercomputer_settings() -> Settings:
    """The settings of the supercomputer, also where the deployment is `development`.

    Raises:
        ConfigurationError: see `load_settings`.
    """
    return load_settings(SUPERCOMPUTER_SITE_OVERRIDES, supercomputer=True)


def running_on_supercomputer() -> dg.DefaultSensorStatus:
    """Whether such a sensor runs by itself. Wrong settings count as a supercomputer's: its ticks fail with them."""
    try:
        runs = load_settings(SUPERCOMPUTER_SITE_OVERRIDES).on_supercomputer
    except ConfigurationError:
        runs = True
    return dg.DefaultSensorStatus.RUNNING if runs else dg.DefaultSensorStatus.STOPPED
