"""All that looks after runs and jobs by itself, for one code location."""

from dataclasses import dataclass

import dagster as dg

from dagster_sbatch.project import Project
from dagster_sbatch.upkeep.dead_runs import end_dead_runs_sensor
from dagster_sbatch.upkeep.orphans import make_cleaning_sensor, make_job_checks, make_orphan_sensor


@dataclass(frozen=True)
class Upkeep:
    """What looks after runs and jobs.

    Attributes:
        sensors: end runs whose process is gone, cancel or list jobs that no run follows, remove old run directories.
        checks: of the asset `musica_access`, on the jobs.
    """

    sensors: tuple[dg.SensorDefinition, ...]
    checks: tuple[dg.AssetChecksDefinition, ...]


def make_upkeep(project: Project) -> Upkeep:
    """Make the sensors and checks that look after runs and jobs."""
    sensors = (end_dead_runs_sensor, make_orphan_sensor(project), make_cleaning_sensor(project))
    return Upkeep(sensors, make_job_checks(project))
