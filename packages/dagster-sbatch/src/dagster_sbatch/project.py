"""The code location that uses this package."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dagster_sbatch.setting_files import load_settings
from dagster_sbatch.setting_paths import expand_here
from dagster_sbatch.settings import Settings
from dagster_sbatch.sites import SITES
from dagster_sbatch.slurm.site import Site, load_site


@dataclass(frozen=True)
class Project:
    """A code location: where it lies, and which supercomputers it knows.

    Attributes:
        root: its folder, with `.env`, `envs/`, `dagster.yaml` and `requirements/`.
        site_overrides: SUPERCOMPUTER_SITE_OVERRIDES, merged over the facts that this package has about each site.
        workload_folder: of its workloads, below the root. It is sent to the supercomputer as a whole.

    Example:
        PROJECT = Project(Path(__file__).resolve().parent.parent, SUPERCOMPUTER_SITE_OVERRIDES, "my_project/workloads")
    """

    root: Path
    site_overrides: Mapping[str, Any] = field(default_factory=dict)
    workload_folder: str = "workloads"

    @property
    def workloads(self) -> Path:
        """The folder of the workloads, as an absolute path."""
        return self.root / self.workload_folder

    @property
    def lock(self) -> Path:
        """The locked packages of the supercomputer: `requirements/cluster.txt`."""
        return self.root / "requirements" / "cluster.txt"

    @property
    def only_site(self) -> str | None:
        """The name of the site in `site_overrides`, if there is only one."""
        return next(iter(self.site_overrides)) if len(self.site_overrides) == 1 else None

    def load_settings(self, *, supercomputer: bool = False) -> Settings:
        """Read the settings of this project; see `dagster_sbatch.setting_files.load_settings`."""
        return load_settings(SITES.keys() | self.site_overrides.keys(), self.root, supercomputer)

    def load_site(self, name: str | None) -> Site:
        """Return a site, checked; see `dagster_sbatch.slurm.site.load_site`."""
        return load_site(self.site_overrides, name or "")

    def local_data_root(self, settings: Settings) -> Path:
        """Return DATA_ROOT on this machine. A relative one counts from the root, wherever Dagster was started."""
        return self.root / expand_here(settings.data_root or "data")
