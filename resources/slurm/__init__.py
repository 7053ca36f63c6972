"""Slurm: what an asset asks for, what the site has, and the job script that comes of it."""

from resources.slurm.allocation import Allocation, allocate
from resources.slurm.request import SlurmRequest
from resources.slurm.script import render_job_script
from resources.slurm.site import Site, load_site

__all__ = ["Allocation", "Site", "SlurmRequest", "allocate", "load_site", "render_job_script"]
