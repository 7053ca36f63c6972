"""The code location: everything Dagster knows about this project."""

import dagster as dg

from dagster_sbatch import link_to_source
from jobs import all_checks, all_jobs, all_observed, all_sensors
from musica_pipelines import assets
from resources import PROJECT, build_resources

defs = dg.Definitions(
    # Every asset and asset check in assets/ is found; the UI links each asset to its source code.
    assets=[*link_to_source(dg.load_assets_from_package_module(assets), PROJECT.root), *all_observed],
    asset_checks=[*dg.load_asset_checks_from_package_module(assets), *all_checks],
    jobs=all_jobs,
    sensors=all_sensors,
    resources=build_resources(),
    # One process per run: a process per step would take 5 s to start, and these assets mostly wait for each other.
    # Several runs are parallel. For parallel assets within a run: dg.multiprocess_executor.
    executor=dg.in_process_executor,
)
