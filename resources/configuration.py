"""Whether the project is configured right: all that can be known without an asset and without a connection."""

from collections.abc import Mapping
from typing import Any

from resources.launchers import RayLauncher, ScriptLauncher
from resources.settings import Settings, load_settings
from resources.slurm import SlurmRequest, allocate, load_site


def check_configuration(site_overrides: Mapping[str, Any], *, supercomputer: bool = False) -> Settings:
    """Return the settings, when they, the entries of all sites and the preferred partition and QoS are right.

    Args:
        site_overrides: SUPERCOMPUTER_SITE_OVERRIDES.
        supercomputer: as for `load_settings`.

    Raises:
        ConfigurationError: something is wrong; the text says what.
    """
    settings = load_settings(site_overrides, supercomputer=supercomputer)
    sites = {name: load_site(site_overrides, name) for name in site_overrides}
    for site in sites.values():
        for launcher in (RayLauncher, ScriptLauncher):
            launcher().with_site(site.launchers)
    if settings.supercomputer_site:
        shortest = SlurmRequest(time_limit="1")
        allocate(shortest, sites[settings.supercomputer_site], settings.partition, settings.qos)
    return settings
