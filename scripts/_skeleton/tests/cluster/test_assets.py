"""The assets that DEMO in jobs/pipelines.py selects, materialised on the simulated supercomputer."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_in_a_box import SimulatedSite

pytestmark = [pytest.mark.cluster, pytest.mark.smoke]


def test_the_assets_are_materialised_by_jobs(
    materialise_demo: Callable[[], set[str]], slurm_site: SimulatedSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".ssh").mkdir(mode=0o700)
    shutil.copy(slurm_site.login.known_hosts, tmp_path / ".ssh")
    for name, value in {**slurm_site.environment(), "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    assert "job_id" in materialise_demo(), "no asset that DEMO selects has run as a job"
