"""Launchers: start the workload inside an allocation: a program, a batch script, or the driver of a Ray cluster."""

from dagster_sbatch.launchers.base import Launcher, ScriptLauncher
from dagster_sbatch.launchers.command import BatchScriptLauncher, CommandLauncher
from dagster_sbatch.launchers.container import Container
from dagster_sbatch.launchers.ray import RayLauncher
from dagster_sbatch.launchers.srun import SrunLauncher
