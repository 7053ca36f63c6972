"""A copy passes its own tests and runs its demo, both also on a simulated supercomputer."""

import sys
from pathlib import Path

import pytest

from slurm_in_a_box import SimulatedSite
from support.new_project import made_in, run_in

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_in(tmp_path_factory.mktemp("copy"))


def test_a_copy_passes_all_its_tests(site: SimulatedSite, copy: Path) -> None:
    """It starts a site of its own beside this one, which shows that a site can be simulated here."""
    done = run_in(copy, sys.executable, "scripts/test", "-n", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout


def test_its_demo_runs_here_and_on_a_simulated_supercomputer(site: SimulatedSite, copy: Path) -> None:
    """The owner's settings of the real one are not used."""
    (copy / "envs" / ".env.musica").write_text("SLURM_ACCOUNT=another\n")
    done = run_in(copy, sys.executable, "scripts/demo", COLUMNS="200")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("pi 3.13504, points 200000") == 2
    assert done.stdout.count("job_id 1") == 1
    assert run_in(copy, "git", "status", "--porcelain").stdout == ""
