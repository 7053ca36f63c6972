"""The first asset, materialised on the simulated supercomputer."""

import math
import shutil
from pathlib import Path

import dagster as dg
import pytest
from dagster_sbatch import ComputeResource, Project
from musica_pipelines.assets.estimates import pi_estimate
from slurm_in_a_box import SimulatedSite

pytestmark = [pytest.mark.cluster, pytest.mark.smoke]


def test_pi_is_estimated_by_a_job(
    project: Project, slurm_site: SimulatedSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".ssh").mkdir(mode=0o700)
    shutil.copy(slurm_site.login.known_hosts, tmp_path / ".ssh")
    for name, value in {**slurm_site.environment(), "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    result = dg.materialize([pi_estimate], resources={"compute": ComputeResource.of(project)})
    (event,) = result.asset_materializations_for_node("pi_estimate")
    assert event.metadata["pi"].value == pytest.approx(math.pi, abs=0.02)
    assert event.metadata["job_id"].value
