"""What jobs have used and a project has left, by the real Slurm; the ledger agrees with sreport(1)."""

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dagster_sbatch.commands import costs
from dagster_sbatch.costs.budget import budgets_of
from dagster_sbatch.costs.ledger import OTHER, UNKNOWN, Sum, make_ledger, sum_by
from dagster_sbatch.inspect.remote_runs import open_runs
from dagster_sbatch.slurm.gateway import Usage
from resources import PROJECT
from slurm_in_a_box import CERTIFICATE_USER, CPU_PARTITION, GPU_PARTITION, SimulatedSite, wait_until
from slurm_in_a_box.layout import DATABASE
from slurm_in_a_box.slurm_configuration import ACCOUNT, LIMITED_ACCOUNT

pytestmark = pytest.mark.cluster

KEY = "my_asset-0123456789-abcdef0123-1"
TWO_LIVES = '[ "$SLURM_RESTART_COUNT" ] || sleep 300'
STRETCHED = 100


def submit(site: SimulatedSite, project: str, gpus: int, script: str, *options: str) -> int:
    partition = GPU_PARTITION if gpus else CPU_PARTITION
    options = (*options, f"--gres=gpu:{gpus}") if gpus else options
    where = (f"--account={project}", f"--partition={partition}", f"--qos={partition}", "--nodes=1", "--time=10")
    return site.submit(script, *where, "--cpus-per-task=1", *options)


def move_to_the_past(site: SimulatedSite, first: int, until: int) -> None:
    """Let the jobs since `first` have run some hours ago, for STRETCHED times as long: sreport knows whole hours."""
    database = site.machines[DATABASE.hostname]
    begin = until - 4 * 3600
    site.cluster.accounting.stop()
    start = f"{begin} + 60 * (job_db_inx % 20)"
    times = f"time_end = {start} + {STRETCHED} * (time_end - time_start), time_start = {start}, time_submit = {start}"
    statements = [
        f"update musica_job_table set {times}, time_eligible = {start} where id_job >= {first}",
        f"update musica_last_ran_table set hourly_rollup = {begin - 3600}",
    ]
    database.run(["mariadb", "--execute", f"use slurm_acct_db; {'; '.join(statements)}"])
    site.cluster.accounting.start()


def sreport(site: SimulatedSite, begin: int, end: int) -> dict[tuple[str, str], int]:
    """Seconds of nodes and GPUs by project and resource, of all users."""
    times = [f"{name}={datetime.fromtimestamp(at):%Y-%m-%dT%H:%M:%S}" for name, at in (("start", begin), ("end", end))]
    command = ["sreport", "-nP", "-t", "seconds", "--tres=node,gres/gpu", "cluster", "AccountUtilizationByUser", *times]
    rows = [row.split("|") for row in site.machines[DATABASE.hostname].run(command).stdout.splitlines()]
    return {(row[1], row[4]): int(row[5]) for row in rows if not row[2] and row[1] != "root"}


def ask() -> Usage:
    with open_runs(PROJECT.load_settings(supercomputer=True), PROJECT, 60) as runs:
        return runs.gateway.usage(datetime.now(UTC) - timedelta(days=15))


def test_the_ledger_agrees_with_sreport(
    site: SimulatedSite,
    on_supercomputer: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """A job of an asset, an array job without a comment, a requeued job of two lives, a job of another project."""
    settings = PROJECT.load_settings(supercomputer=True)
    before = budgets_of(ask(), settings)[0]
    assert (before.project, before.limit, before.source) == (LIMITED_ACCOUNT, 10, f"GrpTRESMins of {LIMITED_ACCOUNT}")
    again = submit(site, LIMITED_ACCOUNT, 2, TWO_LIVES, "--job-name=again")
    submit(site, LIMITED_ACCOUNT, 4, "sleep 17", f"--job-name={KEY}", f"--comment=key={KEY},asset=my_asset")
    submit(site, LIMITED_ACCOUNT, 1, "sleep 3", f"--job-name={KEY}", "--array=0-1")
    submit(site, ACCOUNT, 0, "sleep 3")
    site.wait_for_job(again, "RUNNING", timeout=60)
    running = budgets_of(ask(), settings)[0]
    assert running.running is not None
    assert running.running > 4 * 9 / 60  # 4 GPUs for most of ten minutes
    site.faults.requeue_job(again)
    wait_until(lambda: not site.squeue("--noheader"), "the end of all jobs", 90)
    wait_until(
        lambda: [job.end is not None for job in ask().jobs or ()] == [True] * 6, "all ends in the accounting", 30
    )
    after = budgets_of(ask(), settings)[0]
    assert before.left is not None
    assert after.left is not None
    assert after.left <= before.left - 1 / 60
    assert (after.running, after.queued) == (0, 0)

    until = int(time.time()) // 3600 * 3600
    move_to_the_past(site, again, until)
    wait_until(lambda: sreport(site, until - 4 * 3600, until) != {}, "a report", 30)
    reported = sreport(site, until - 4 * 3600, until)
    entries = make_ledger(
        ask(), PROJECT.load_site("musica"), lambda _: None, datetime.fromtimestamp(until, UTC) - timedelta(hours=4)
    )
    for (project,), used in sum_by(entries, ["project"]):
        assert in_seconds(used) == (reported[project, "node"], reported[project, "gres/gpu"])
    print(reported)
    jobs = {asset: used.jobs for (asset,), used in sum_by(entries, ["asset"])}
    assert jobs == {"my_asset": 1, UNKNOWN: 2, OTHER: 3}

    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", "scripts/costs --by user,project".split())
    assert costs.main(PROJECT) == 0
    said = capsys.readouterr().out
    assert f"of 10.00 GPU-hours are left (GrpTRESMins of {LIMITED_ACCOUNT})." in said
    assert f"{CERTIFICATE_USER.name}  {LIMITED_ACCOUNT}     5" in said
    with site.faults.accounting_off():
        assert costs.main(PROJECT) == 1
    said = capsys.readouterr().out
    assert "not known: sacct: " in said
    assert "0.00" not in said


def in_seconds(used: Sum) -> tuple[int, int]:
    assert used.node_hours is not None
    assert used.gpu_hours is not None
    return round(used.node_hours * 3600), round(used.gpu_hours * 3600)
