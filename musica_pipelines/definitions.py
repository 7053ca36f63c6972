"""The code location: everything Dagster knows about this project."""

import dagster as dg

from jobs import all_checks, all_jobs, all_observed, all_sensors
from musica_pipelines.assets import flight_delays
from resources import build_resources

assets = dg.load_assets_from_modules([flight_delays])

defs = dg.Definitions(
    assets=[*assets, *all_observed],
    asset_checks=all_checks,
    jobs=all_jobs,
    sensors=all_sensors,
    resources=build_resources(),
    # One process a run: a process a step would take 5 s to start, and these assets mostly wait for each other.
    # Runs are parallel to each other. For parallel assets within a run: dg.multiprocess_executor.
    executor=dg.in_process_executor,
)
