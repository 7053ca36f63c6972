"""When it runs: jobs, schedules and sensors."""

from jobs.pipelines import flight_delays_job

all_jobs = [flight_delays_job]
"""What the code location offers."""

__all__ = ["all_jobs", "flight_delays_job"]
