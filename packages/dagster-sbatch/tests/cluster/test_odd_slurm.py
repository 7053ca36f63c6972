"""Slurm as some centres have it: hidden partitions, a database of several clusters, variables of the user."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from dagster_sbatch.inspect.diagnosis import examine
from dagster_sbatch.inspect.remote_runs import Runs, open_runs
from dagster_sbatch.slurm import SlurmRequest, allocate, render_job_script
from dagster_sbatch.slurm.gateway import Limits
from resources import PROJECT
from slurm_in_a_box import CERTIFICATE_USER, CPU_PARTITION, GPU_PARTITION, SimulatedSite
from slurm_in_a_box.layout import DATABASE
from slurm_in_a_box.slurm_configuration import ACCOUNT
from support.submission import submit_run

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("on_supercomputer")]
SITE = PROJECT.load_site("musica")
WAITS = SlurmRequest(options=("--begin=now+1hour",))
ELSEWHERE = "p90000"
"""A project of the user on another cluster."""


@pytest.fixture
def runs(on_supercomputer: dict[str, str]) -> Iterator[Runs]:
    with open_runs(PROJECT.load_settings(supercomputer=True), PROJECT) as opened:
        yield opened


@pytest.fixture
def hidden(site: SimulatedSite) -> Iterator[None]:
    """Slurm lists the partition and its jobs only for those who ask for all."""

    def hide(answer: str) -> None:
        site.cluster.query("scontrol", "update", f"PartitionName={CPU_PARTITION}", f"Hidden={answer}")

    hide("YES")
    yield
    hide("NO")


@pytest.fixture
def other_cluster(site: SimulatedSite) -> Iterator[None]:
    """Another cluster whose jobs the same database accounts for; it comes first in all lists."""

    def manage(*arguments: str) -> None:
        site.machines[DATABASE.hostname].run(["sacctmgr", "--immediate", "--quiet", *arguments])

    manage("add", "cluster", "a_cluster")
    manage("add", "account", f"{ELSEWHERE},{ACCOUNT}", "cluster=a_cluster", "Description=test", "Organization=test")
    user = ("add", "user", CERTIFICATE_USER.name, "cluster=a_cluster", "MaxSubmitJobs=3")
    for account in (ELSEWHERE, ACCOUNT):
        manage(*user, f"Account={account}", f"DefaultAccount={ELSEWHERE}")
    yield
    manage("delete", "cluster", "a_cluster")
    manage("delete", "account", ELSEWHERE)


def files_of(request: SlurmRequest, key: str, body: str = "sleep 300") -> dict[str, str]:
    complete = allocate(request, SITE, CPU_PARTITION, CPU_PARTITION).request
    return {"job.sh": render_job_script(complete, SITE, job_name=key, about={}, environment={}, body=body)}


@pytest.mark.usefixtures("hidden")
def test_a_job_in_a_hidden_partition_is_seen(site: SimulatedSite, runs: Runs) -> None:
    """Its submission got no answer, and it waits: another look at the queue finds it, so it is submitted once."""
    with site.faults.accounting_off(), site.faults.sbatch("error-after"):
        found = submit_run(runs.gateway, f"{runs.folder}/hidden-1", files_of(WAITS, "hidden-1"))
    assert found.how == "found"
    assert site.squeue("--noheader", "--format=%i").split() == [found.job]
    assert found.job in runs.gateway.queue(runs.folder)["jobs"]
    findings = dict(examine(PROJECT, open_instance=dg.DagsterInstance.ephemeral))
    assert findings["partitions"].found == f"{CPU_PARTITION}, {GPU_PARTITION}"


@pytest.mark.usefixtures("other_cluster")
def test_the_projects_and_limits_of_another_cluster_do_not_count(runs: Runs) -> None:
    known, usage = runs.gateway.projects(), runs.gateway.usage(None)
    assert known.default == usage.default == ACCOUNT
    assert ELSEWHERE not in {*known.qos, *usage.projects}
    assert (usage.shares is None, usage.trouble) == (False, [])
    assert runs.gateway.limits(CPU_PARTITION, CPU_PARTITION, ACCOUNT) == Limits(10001, 20000)


def test_the_limit_of_all_users_of_a_project_counts(site: SimulatedSite, runs: Runs) -> None:
    """Slurm would never accept a larger array job."""
    change = ("sacctmgr", "--immediate", "modify", "account", ACCOUNT, "set")
    site.cluster.query(*change, "GrpSubmitJobs=40")
    try:
        assert runs.gateway.limits(CPU_PARTITION, CPU_PARTITION, ACCOUNT) == Limits(10001, 40)
    finally:
        site.cluster.query(*change, "GrpSubmitJobs=-1")


def test_variables_of_the_login_shell_do_not_keep_a_job_from_being_cancelled(site: SimulatedSite, runs: Runs) -> None:
    exports = f"export SCANCEL_PARTITION={GPU_PARTITION} SCANCEL_STATE=PENDING SLURM_CLUSTERS=elsewhere"
    for name in (".bash_profile", ".bashrc"):
        site.run_on_login(CERTIFICATE_USER, f"echo '{exports}' >{Path(name)}")
    path = f"{runs.folder}/cancelled-1"
    job = submit_run(runs.gateway, path, files_of(SlurmRequest(), "cancelled-1")).job
    site.wait_for_job(int(job), "RUNNING")
    end = runs.gateway.cancel(path)
    assert end is not None
    assert end.state == "CANCELLED"
    findings = dict(examine(PROJECT, open_instance=dg.DagsterInstance.ephemeral))
    assert findings["partitions"].found == f"{CPU_PARTITION}, {GPU_PARTITION}"


def test_limits_of_the_login_node_do_not_count_in_jobs(site: SimulatedSite, runs: Runs) -> None:
    """Of processes, address space and CPU time."""
    limits = "ulimit -S -u 4000 -v 32000000 -t 3600"
    site.run_on_login(CERTIFICATE_USER, f"echo '{limits}' >.bashrc")
    path = f"{runs.folder}/limits-1"
    shown = "; ".join(f"ulimit -{which} -u; ulimit -{which} -v; ulimit -{which} -t" for which in "SH")
    job = submit_run(runs.gateway, path, files_of(SlurmRequest(), "limits-1", f"cat /proc/$PPID/limits; {shown}")).job
    site.wait_for_job(int(job))
    said = (site.layout.home / Path(path).relative_to("/home") / "stdout").read_text().splitlines()
    assert said[-6:-3] == said[-3:]
