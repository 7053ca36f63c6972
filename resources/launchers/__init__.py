"""What runs inside an allocation: a plain script, or a Ray cluster around it."""

from resources.launchers.base import Launcher
from resources.launchers.ray import RayLauncher
from resources.launchers.script import ScriptLauncher

__all__ = ["Launcher", "RayLauncher", "ScriptLauncher"]
