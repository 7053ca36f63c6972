"""A copy passes its own tests, the one on a simulated supercomputer included."""

import sys
from pathlib import Path

import pytest

from slurm_in_a_box import SimulatedSite
from support.new_project import made_in, run_in

pytestmark = pytest.mark.cluster


def test_a_copy_passes_all_its_tests(site: SimulatedSite, tmp_path: Path) -> None:
    """It starts a site of its own beside this one, which shows that a site can be simulated here."""
    done = run_in(made_in(tmp_path), sys.executable, "scripts/test", "-n", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout
