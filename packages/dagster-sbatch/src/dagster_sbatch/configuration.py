"""Whether the project is configured right: all that can be known without an asset and without a connection."""

from dagster_sbatch.launchers import RayLauncher, ScriptLauncher
from dagster_sbatch.project import Project
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import SlurmRequest, allocate


def check_configuration(project: Project, *, supercomputer: bool = False) -> Settings:
    """Return the settings, when they, the entries of all sites and the preferred partition and QoS are right.

    Args:
        project: whose.
        supercomputer: as for `load_settings`.

    Raises:
        ConfigurationError: something is wrong; the text says what.
    """
    settings = project.load_settings(supercomputer=supercomputer)
    sites = {name: project.load_site(name) for name in project.site_overrides}
    for site in sites.values():
        for launcher in (RayLauncher, ScriptLauncher):
            launcher().with_site(site.launchers)
    if settings.supercomputer_site:
        shortest = SlurmRequest(time_limit="1")
        allocate(shortest, sites[settings.supercomputer_site], settings.partition, settings.qos)
    return settings
