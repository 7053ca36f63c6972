"""When it runs: jobs, schedules and sensors."""

from jobs.credentials import access_health, musica_access, refresh_credentials_job, refresh_credentials_sensor
from jobs.pipelines import pipelines
from jobs.upkeep import upkeep

all_jobs = (*pipelines, refresh_credentials_job)
all_sensors = (refresh_credentials_sensor, *upkeep.sensors)
all_checks = (access_health, *upkeep.checks)
all_observed = (musica_access, upkeep.asset)
"""Jobs, checks, sensors, and assets that Dagster observes and does not make."""

__all__ = ["all_checks", "all_jobs", "all_observed", "all_sensors"]
