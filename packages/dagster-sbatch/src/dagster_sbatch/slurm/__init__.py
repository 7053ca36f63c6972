"""Slurm: the request of an asset, the site's partitions and limits, and the job script."""

from dagster_sbatch.slurm.allocation import Allocation, allocate
from dagster_sbatch.slurm.job_script import SAMPLER_FILES, ArrayShape, render_job_script, render_start
from dagster_sbatch.slurm.request import Retries, SlurmRequest
from dagster_sbatch.slurm.site import ContainerRuntime, Site, load_site
