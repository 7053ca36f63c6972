"""How it runs: the resources of the code location, and what is particular to each supercomputer."""

from typing import Any

SUPERCOMPUTER_SITE_OVERRIDES: dict[str, dict[str, Any]] = {
    "musica": {"launchers": {"ray": {"pre_start_commands": ["ulimit -n 65536"]}}},
}
"""By SLURM_SUPERCOMPUTER_SITE. Each entry is merged over what the project knows of that site (`resources/sites/`)."""


def build_resources() -> dict[str, Any]:
    """The resources of the code location. They read no settings until a run needs them: the location always loads."""
    from resources.compute import ComputeResource

    return {"compute": ComputeResource(site_overrides=SUPERCOMPUTER_SITE_OVERRIDES)}
