"""Nodes that are lost under a Ray job, while it starts and in mid-run: the cause, another try, and nothing is left."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dagster_sbatch.launchers import RayLauncher
from dagster_sbatch.run import remote_job
from dagster_sbatch.slurm import Retries
from slurm_in_a_box import SimulatedSite, wait_until
from slurm_in_a_box.faults import Fault
from support.background import attempts_of
from support.ray_run import HANG, ON_THE_SECOND, RayRun, cause_of, nothing_is_left, place, share_out

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("on_supercomputer")]
BY_SLURM = "a node failed (Slurm: NODE_FAIL)"
REGISTERED = 240
"""Seconds. Slurm ends what a node that was cut off still runs when that registers again, a minute or two later."""
BY_RAY = "Ray: lost the node {second}: "
"""Alone, or after Slurm's word if Slurm declares the node lost before the rest of the job has ended."""


def make_fault(site: SimulatedSite, kind: str, node: str) -> Fault:
    return {"off": site.faults.node_off, "cut": site.faults.node_cut}[kind](node)


def start(site: SimulatedSite, folder: Path, name: str, nodes: tuple[str, ...], before: str, tries: int = 2) -> RayRun:
    launcher = RayLauncher(pre_start_commands=[before], ray_start_args=["--include-dashboard=false"])
    request = {"options": ["--no-requeue"], "retries": Retries(max_retries=tries - 1), **place(nodes)}
    return RayRun(site, folder, HANG, name=name, launcher=launcher, **request)


def another_try_succeeds(site: SimulatedSite, run: RayRun, nodes: tuple[str, ...]) -> str:
    """Let the second try end well; the cause of the first one's failure."""
    run.go_on()
    outcome = run.finish()
    assert outcome.error == ""
    assert outcome.materializations[None][0]["hosts"] == list(nodes)
    first, _ = attempts_of(outcome.materializations[None][0])
    nothing_is_left(site, *nodes, seconds=REGISTERED)
    return str(first["end"])


def lose_at_the_start(site: SimulatedSite, folder: Path, nodes: tuple[str, ...]) -> None:
    """Slurm's word ends the job, however the node was lost: here Slurm says so at once."""
    dawdle = f"{ON_THE_SECOND}[ -e ~/begun ] || {{ echo $SLURM_JOB_ID >~/begun; sleep 300; }}"
    run = start(site, folder, "dawdling", nodes, dawdle)
    begun = run.home / "begun"
    wait_until(lambda: begun.exists() and begun.read_text(), "the second node has begun", 120)
    with site.faults.node_down(nodes[1]):
        site.wait_for_job(int(begun.read_text()), "NODE_FAIL", timeout=90)
        nothing_is_left(site, nodes[0])
    assert another_try_succeeds(site, run, nodes).startswith(BY_SLURM)


WATCHFUL = "export RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=1000"
"""Then Ray misses a node well before Slurm does."""
LOST = {
    "the head is switched off": ("off", 0, ":", [BY_SLURM], 1),
    "a worker is switched off, and Ray notices": ("off", 1, WATCHFUL, [BY_RAY], 2),
    "a worker is cut off, and whoever notices": ("cut", 1, ":", [BY_RAY, BY_SLURM], 1),
}
"""By name: the fault, which node of the pair, its command before Ray, the possible causes, and the tries."""

RAY_MIB = 150
"""Its processes on a node have more."""


def usage_of(home: Path, job: int) -> dict[str, Any] | None:
    """What a job has used, by its own record."""
    runs = (home / "dagster-slurm" / "runs").iterdir()
    (folder,) = (run for run in runs if (run / "job").is_symlink() and str((run / "job").readlink()) == str(job))
    lines = map(json.loads, (folder / "events").read_text().splitlines())
    return next((line["usage"] for line in lines if "usage" in line), None)


def lose_in_mid_run(name: str, site: SimulatedSite, folder: Path, nodes: tuple[str, ...]) -> None:
    kind, which, before, causes, tries = LOST[name]
    run = start(site, folder, name.replace(" ", "-"), nodes, before, tries)
    run.wait_until_ready()
    job = run.job
    if kind == "cut":
        sampler = "pgrep -f '[s]ampler.py node'"
        wait_until(lambda: site.run_on_node(nodes[1], sampler, check=False).stdout, "its sampler runs", 60)
    with make_fault(site, kind, nodes[which]):
        site.wait_for_job(job, "FAILED", "NODE_FAIL", timeout=90)
        nothing_is_left(site, nodes[1 - which])
    if tries == 1:
        cause = cause_of(run.finish().error)
        nothing_is_left(site, *nodes, seconds=REGISTERED)
    else:
        cause = another_try_succeeds(site, run, nodes)
    assert any(known.format(second=nodes[1]) in cause for known in causes), cause
    usage = usage_of(run.home, job)
    assert not (usage and which == 0)  # the batch script has died with the head
    assert (usage or {}).get("memory_mib", RAY_MIB) >= RAY_MIB  # right, or absent if it was noticed late


def test_lost_nodes(site: SimulatedSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_job, "RETRY_SECONDS", 1)
    cases = {name: partial(lose_in_mid_run, name, site, tmp_path) for name in LOST}
    share_out({**cases, "while Ray starts": partial(lose_at_the_start, site, tmp_path)})
