"""What runs inside an allocation: a plain script, or a Ray cluster around it."""

from dagster_sbatch.launchers.base import Launcher
from dagster_sbatch.launchers.ray import RayLauncher
from dagster_sbatch.launchers.script import ScriptLauncher

__all__ = ["Launcher", "RayLauncher", "ScriptLauncher"]
