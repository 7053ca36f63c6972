"""When it runs: jobs, schedules and sensors."""

from jobs.credentials import access_health, musica_access, refresh_credentials_job, refresh_credentials_sensor
from jobs.dead_runs import end_dead_runs_sensor
from jobs.orphans import (
    cancel_orphaned_jobs_sensor,
    clean_run_directories_sensor,
    jobs_are_followed,
    jobs_are_reachable,
)
from jobs.pipelines import flight_delays_job

all_jobs = (flight_delays_job, refresh_credentials_job)
all_sensors = (
    refresh_credentials_sensor,
    end_dead_runs_sensor,
    cancel_orphaned_jobs_sensor,
    clean_run_directories_sensor,
)
all_checks = (access_health, jobs_are_followed, jobs_are_reachable)
all_observed = (musica_access,)
"""What the code location offers; the last are things that are watched, not made."""

__all__ = ["all_checks", "all_jobs", "all_observed", "all_sensors"]
