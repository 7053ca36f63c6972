"""How it runs: the resources of the code location, and what differs from the known facts of each supercomputer."""

from pathlib import Path
from typing import Any

from dagster_sbatch import Project

SUPERCOMPUTER_SITE_OVERRIDES: dict[str, dict[str, Any]] = {
    "musica": {"launchers": {"ray": {"pre_start_commands": ["ulimit -n 65536"]}}},
}
"""By SLURM_SUPERCOMPUTER_SITE; merged over the facts that dagster_sbatch has about the site.
`dagster_sbatch.Site` lists the keys of an entry."""

PROJECT = Project(
    root=Path(__file__).resolve().parent.parent,
    site_overrides=SUPERCOMPUTER_SITE_OVERRIDES,
    workload_folder="musica_pipelines/workloads",
)


def build_resources() -> dict[str, Any]:
    """Return the resources of the code location. They read settings only in a run, so the location always loads."""
    from dagster_sbatch import ComputeResource

    return {"compute": ComputeResource.of(PROJECT)}
