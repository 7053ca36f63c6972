"""What the code location offers."""

import dagster as dg
from dagster_sbatch.commands import demo
from jobs.pipelines import DEMO
from musica_pipelines.definitions import defs


def test_the_definitions_are_loadable() -> None:
    dg.Definitions.validate_loadable(defs)


def test_the_demo_has_assets() -> None:
    assert demo.runs_of_each(defs, DEMO), "DEMO in jobs/pipelines.py selects no asset that has a partition"
