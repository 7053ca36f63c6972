"""Sensors and checks for the runs, jobs and budgets of one code location."""

from dataclasses import dataclass

import dagster as dg

from dagster_sbatch.project import Project
from dagster_sbatch.upkeep.budget_asset import MUSICA_BUDGET, make_budget_check, make_budget_sensor
from dagster_sbatch.upkeep.cleaning import make_cleaning_sensor
from dagster_sbatch.upkeep.orphans import make_job_checks, make_orphan_sensor


@dataclass(frozen=True)
class Upkeep:
    """Sensors and checks for runs, jobs and budgets.

    Attributes:
        sensors: `cancel_orphaned_jobs` cancels or lists Slurm jobs that no run follows; `clean_run_directories` removes
            old run directories; `observe_budget` observes the asset.
        checks: of the asset `musica_access`: `jobs_are_followed` and `jobs_are_reachable`; of `musica_budget`:
            `budget_lasts`.
        asset: `musica_budget`, whose metadata are what the projects have used and have left.
    """

    sensors: tuple[dg.SensorDefinition, ...]
    checks: tuple[dg.AssetChecksDefinition, ...]
    asset: dg.AssetSpec


def make_upkeep(project: Project) -> Upkeep:
    """Make the sensors and checks for runs, jobs and budgets.

    Example:
        upkeep = make_upkeep(PROJECT)
        defs = dg.Definitions(assets=[upkeep.asset], sensors=upkeep.sensors, asset_checks=upkeep.checks)
    """
    sensors = (make_orphan_sensor(project), make_cleaning_sensor(project), make_budget_sensor(project))
    return Upkeep(sensors, (*make_job_checks(project), make_budget_check(project)), MUSICA_BUDGET)
