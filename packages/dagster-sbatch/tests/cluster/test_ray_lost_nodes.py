"""Nodes that are lost under a Ray job, while it starts and in mid-run: another try follows, and nothing is left."""

from pathlib import Path

import pytest

from dagster_sbatch.launchers import RayLauncher
from dagster_sbatch.run import remote
from slurm_in_a_box import SimulatedSite, wait_until
from slurm_in_a_box.faults import Fault
from support.ray_run import HANG, NODES, ON_THE_SECOND, PLACE, RayRun, cause_of, nothing_is_left

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("on_supercomputer")]
BY_SLURM = "a node failed (Slurm: NODE_FAIL)"
BY_RAY = "Ray: lost the node n4002: "
"""Alone, or after Slurm's word if Slurm declares the node lost before the rest of the job has ended."""


@pytest.fixture(autouse=True)
def _try_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETRY_SECONDS", 1)


def make_fault(site: SimulatedSite, kind: str, node: str) -> Fault:
    return {"off": site.faults.node_off, "cut": site.faults.node_cut}[kind](node)


def another_try_succeeds(site: SimulatedSite, run: RayRun) -> str:
    """Let the second try end well; the cause of the first one's failure."""
    (run.home / "go").touch()
    outcome = run.finish()
    assert outcome.error == ""
    assert outcome.materializations[None][0]["hosts"] == list(NODES)
    (told,) = outcome.retries
    nothing_is_left(site, *NODES)
    return cause_of(told)


def test_while_ray_starts(site: SimulatedSite, tmp_path: Path) -> None:
    """Slurm's word ends the job, however the node was lost: here Slurm says so at once."""
    dawdle = f"{ON_THE_SECOND}[ -e ~/begun ] || {{ echo $SLURM_JOB_ID >~/begun; sleep 300; }}"
    launcher = RayLauncher(pre_start_commands=[dawdle], ray_start_args=["--include-dashboard=false"])
    run = RayRun(site, tmp_path, HANG, launcher=launcher, options=["--no-requeue"], **PLACE)
    begun = run.home / "begun"
    wait_until(lambda: begun.exists() and begun.read_text(), "the second node has begun", 120)
    with site.faults.node_down("n4002"):
        site.wait_for_job(int(begun.read_text()), "NODE_FAIL", timeout=90)
        nothing_is_left(site, "n4001")
    assert another_try_succeeds(site, run).startswith(BY_SLURM)


WATCHFUL = "export RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=1000"
"""Then Ray misses a node well before Slurm does."""
LOST = {
    "a worker is switched off, and Ray notices": ("off", "n4002", WATCHFUL, [BY_RAY]),
    "a worker is cut off, and whoever notices": ("cut", "n4002", ":", [BY_RAY, BY_SLURM]),
    "the head is switched off": ("off", "n4001", ":", [BY_SLURM]),
}


@pytest.mark.parametrize("name", LOST)
def test_in_mid_run(name: str, site: SimulatedSite, tmp_path: Path) -> None:
    kind, node, before, causes = LOST[name]
    launcher = RayLauncher(pre_start_commands=[before], ray_start_args=["--include-dashboard=false"])
    run = RayRun(site, tmp_path, HANG, launcher=launcher, options=["--no-requeue"], **PLACE)
    run.wait_until_ready()
    job = run.job
    with make_fault(site, kind, node):
        site.wait_for_job(job, "FAILED", "NODE_FAIL", timeout=90)
        nothing_is_left(site, *(set(NODES) - {node}))
    cause = another_try_succeeds(site, run)
    assert any(known in cause for known in causes), cause
