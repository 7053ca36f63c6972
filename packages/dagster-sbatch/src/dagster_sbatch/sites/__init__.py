"""Facts about supercomputers, by SLURM_SUPERCOMPUTER_SITE. SUPERCOMPUTER_SITE_OVERRIDES is merged over them."""

from typing import Any

from dagster_sbatch.sites.musica import MUSICA

SITES: dict[str, dict[str, Any]] = {"musica": MUSICA}  # the keys of an entry: `dagster_sbatch.slurm.site.Site`
