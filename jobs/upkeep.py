"""Sensors and checks that look after runs and Slurm jobs."""

from dagster_sbatch import make_upkeep
from resources import PROJECT

upkeep = make_upkeep(PROJECT)
