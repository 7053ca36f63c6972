"""When it runs: jobs, schedules and sensors."""

from jobs.credentials import access_health, musica_access, refresh_credentials_job, refresh_credentials_sensor
from jobs.pipelines import flight_delays_job
from jobs.upkeep import upkeep

all_jobs = (flight_delays_job, refresh_credentials_job)
all_sensors = (refresh_credentials_sensor, *upkeep.sensors)
all_checks = (access_health, *upkeep.checks)
all_observed = (musica_access, upkeep.asset)
"""What the code location offers; the last are things that are watched, not made."""

__all__ = ["all_checks", "all_jobs", "all_observed", "all_sensors"]
