"""Launchers: start the workload inside an allocation, as one process or as the driver of a Ray cluster."""

from dagster_sbatch.launchers.base import Launcher
from dagster_sbatch.launchers.ray import RayLauncher
from dagster_sbatch.launchers.script import ScriptLauncher

__all__ = ["Launcher", "RayLauncher", "ScriptLauncher"]
