"""Checks the configuration of a project, as far as that needs neither an asset nor a connection."""

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.launchers import BatchScriptLauncher, CommandLauncher, RayLauncher, ScriptLauncher, SrunLauncher
from dagster_sbatch.project import Project
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import SlurmRequest
from dagster_sbatch.slurm.allocation import choose_partition, choose_qos


def check_configuration(project: Project, *, supercomputer: bool = False) -> Settings:
    """Return the settings, after a check of them, of all sites and of the preferred partition and QoS.

    Raises ConfigurationError: something is wrong.
    """
    settings = project.load_settings(supercomputer=supercomputer)
    for name in project.site_overrides:
        launchers = project.load_site(name).launchers
        try:
            for launcher in (BatchScriptLauncher, CommandLauncher, RayLauncher, ScriptLauncher, SrunLauncher):
                launcher().with_site(launchers)
        except ConfigurationError as error:
            raise ConfigurationError(f"SUPERCOMPUTER_SITE_OVERRIDES[{name!r}]['launchers']: {error}") from None
    if settings.supercomputer_site:
        site, request = project.load_site(settings.supercomputer_site), SlurmRequest()
        choose_qos(request, site, choose_partition(request, site, settings.partition)[0], settings.qos)
    return settings
