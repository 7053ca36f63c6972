"""The site lets its user submit one job: what exceeds that waits in Dagster, and is submitted when there is room."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.test_reboot import LOCATION, write_programs
from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite
from slurm_in_a_box.layout import DATABASE
from support.dagster_dev import DagsterDev, beside_location, wait_for

pytestmark = pytest.mark.cluster


def limit_jobs(site: SimulatedSite, jobs: int) -> None:
    """Set how many jobs the user may have, those that wait included; -1: no limit. Slurm has it at once."""
    change = ["modify", "user", CERTIFICATE_USER.name, "set", f"MaxSubmitJobs={jobs}"]
    site.machines[DATABASE.hostname].run(["sacctmgr", "--immediate", "--quiet", *change])
    known = ("scontrol", "-o", "show", "assoc_mgr", f"users={CERTIFICATE_USER.name}", "flags=assoc")
    words = "MaxSubmitJobs= " if jobs < 0 else f"MaxSubmitJobs={jobs}("
    wait_for(lambda: words in site.cluster.query(*known), 60, f"slurmctld has {words}")


@pytest.fixture
def one_job(site: SimulatedSite) -> Iterator[None]:
    try:
        limit_jobs(site, 1)
        yield
    finally:
        limit_jobs(site, -1)


@pytest.fixture
def dagster_dev(site: SimulatedSite, tmp_path: Path, client_home: Path) -> Iterator[DagsterDev]:
    programs = write_programs(tmp_path / "waiting")
    (tmp_path / "location.py").write_text(LOCATION)
    variables = {**site.environment(), "HOME": str(client_home), "WAITERS": str(programs)}
    variables["DATA_ROOT"] = f"{CERTIFICATE_USER.home}/data"
    with beside_location(tmp_path / "location.py", tmp_path / "project", variables, "waiting") as server:
        yield server


@pytest.mark.usefixtures("one_job")
def test_runs_beyond_the_submit_limit_wait_and_can_be_terminated(dagster_dev: DagsterDev, site: SimulatedSite) -> None:
    def jobs(*runs: str) -> list[str]:
        rows = site.squeue("--noheader", "--states=all", "--format=%T %k").splitlines()
        return [row.split()[0] for row in rows if any(f"run={run}" in row for run in runs)]

    def waits(run: str) -> bool:
        return any("this step waits until others have ended" in text for text in dagster_dev.messages(run))

    first = dagster_dev.launch("dies", location="waiting")
    wait_for(lambda: jobs(first) == ["RUNNING"], 120, "the first job runs")
    later, ended = (dagster_dev.launch("lives", location="waiting") for _ in range(2))
    wait_for(lambda: waits(later) and waits(ended), 120, "both others say that they wait")
    dagster_dev.terminate(ended)
    assert dagster_dev.wait(ended, 60) == "CANCELED"
    assert (dagster_dev.status(later), jobs(later, ended)) == ("STARTED", [])
    site.run_on_login(CERTIFICATE_USER, "mkdir -p data && touch data/go")
    assert (dagster_dev.wait(first), dagster_dev.wait(later)) == ("SUCCESS", "SUCCESS")
    wait_for(
        lambda: jobs(first, later, ended) == ["COMPLETED"] * 2, 60, "Slurm has one job per run that was not terminated"
    )
