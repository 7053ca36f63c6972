"""Dagster assets that run on a supercomputer through Slurm, and unchanged on a laptop.

The names in `__all__` are the public interface. Everything else is private and may change with any version.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dagster_sbatch.errors import ConfigurationError
    from dagster_sbatch.inspect.source_links import link_to_source
    from dagster_sbatch.launchers import (
        BatchScriptLauncher,
        CommandLauncher,
        Container,
        Launcher,
        RayLauncher,
        ScriptLauncher,
        SrunLauncher,
    )
    from dagster_sbatch.project import Project
    from dagster_sbatch.run.array import JobArray
    from dagster_sbatch.run.array_results import CompletedArray
    from dagster_sbatch.run.compute import ComputeResource
    from dagster_sbatch.run.fake import FakeCompute
    from dagster_sbatch.run_launcher.launcher import ForkingRunLauncher
    from dagster_sbatch.slurm import Retries, Site, SlurmRequest
    from dagster_sbatch.upkeep.credentials import CredentialRefresh, make_credential_refresh
    from dagster_sbatch.upkeep.sensors import Upkeep, make_upkeep

__all__ = [
    "BatchScriptLauncher",
    "CommandLauncher",
    "CompletedArray",
    "ComputeResource",
    "ConfigurationError",
    "Container",
    "CredentialRefresh",
    "FakeCompute",
    "ForkingRunLauncher",
    "JobArray",
    "Launcher",
    "Project",
    "RayLauncher",
    "Retries",
    "ScriptLauncher",
    "Site",
    "SlurmRequest",
    "SrunLauncher",
    "Upkeep",
    "link_to_source",
    "make_credential_refresh",
    "make_upkeep",
]

_MODULES = {
    "errors": "ConfigurationError",
    "inspect.source_links": "link_to_source",
    "launchers": "BatchScriptLauncher CommandLauncher Container Launcher RayLauncher ScriptLauncher SrunLauncher",
    "project": "Project",
    "run.array": "JobArray",
    "run.array_results": "CompletedArray",
    "run.compute": "ComputeResource",
    "run.fake": "FakeCompute",
    "run_launcher.launcher": "ForkingRunLauncher",
    "slurm": "Retries Site SlurmRequest",
    "upkeep.credentials": "CredentialRefresh make_credential_refresh",
    "upkeep.sensors": "Upkeep make_upkeep",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: commands that need no Dagster start without it (PEP 562)."""
    for module, names in _MODULES.items():
        if name in names.split():
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
