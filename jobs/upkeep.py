"""Sensors and checks for runs, Slurm jobs and budgets."""

from dagster_sbatch import make_upkeep
from resources import PROJECT

upkeep = make_upkeep(PROJECT)
