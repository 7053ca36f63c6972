"""What jobs have used and a project has left, by the real Slurm; the ledger agrees with sreport(1)."""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from dagster_sbatch import JobArray
from dagster_sbatch.commands import costs
from dagster_sbatch.costs.budget import Budget, budgets_of, describe, pace_of
from dagster_sbatch.costs.ledger import OTHER, UNKNOWN, Entry, make_ledger, sum_by
from dagster_sbatch.inspect.remote_runs import open_runs
from dagster_sbatch.slurm import SlurmRequest
from dagster_sbatch.slurm.gateway import Usage
from resources import PROJECT
from slurm_in_a_box import (
    CERTIFICATE_USER,
    CPU_PARTITION,
    GPU_PARTITION,
    PLAIN_KEY_USER,
    SimulatedSite,
    User,
    wait_until,
)
from slurm_in_a_box.layout import DATABASE
from support.array_asset import DAYS, ArrayAsset
from support.background import WAITS, Background, go_on, only_job
from support.workload_asset import materialize

pytestmark = pytest.mark.cluster

LIMITED, UNLIMITED, BELOW = "p80001", "p80002", "p80003"
"""Projects of this test alone: what other tests have used on the same site does not count in them."""
KEY = "my_asset-0123456789-abcdef0123-1"
TWO_LIVES = '[ "$SLURM_RESTART_COUNT" ] || sleep 300; sleep 2'
HOUR = 3600


@pytest.fixture
def projects(site: SimulatedSite) -> Iterator[None]:
    """LIMITED and UNLIMITED exist, with two users, and BELOW, a part of LIMITED, with one.

    10 GPU-hours is all that jobs of LIMITED and BELOW may use.
    """

    def manage(*arguments: str) -> None:
        site.machines[DATABASE.hostname].run(["sacctmgr", "--immediate", "--quiet", *arguments])

    both = f"{LIMITED},{UNLIMITED}"
    manage("add", "account", both, "Description=test", "Organization=test")
    manage("modify", "account", LIMITED, "set", "GrpTRESMins=gres/gpu=600")
    for user in (CERTIFICATE_USER, PLAIN_KEY_USER):
        manage("add", "user", user.name, f"Account={both}", f"QOS={CPU_PARTITION},{GPU_PARTITION}")
    manage("add", "account", BELOW, f"parent={LIMITED}", "Description=test", "Organization=test")
    manage("add", "user", CERTIFICATE_USER.name, f"Account={BELOW}")
    yield
    site.cluster.cancel_all()  # Slurm removes no project that has jobs
    manage("delete", "account", BELOW)
    manage("delete", "account", both)


def sreport(site: SimulatedSite, begin: int, end: int) -> dict[tuple[str, str, str], int]:
    """Seconds of nodes and GPUs by project, user and resource, once slurmdbd has summed up these hours.

    It does so by itself after each hour; here it is asked to, also for the hour that has not ended.
    """
    database = site.machines[DATABASE.hostname]
    first, last = (f"{datetime.fromtimestamp(at, UTC):%Y-%m-%dT%H:%M:%S}" for at in (begin, end))
    database.run(["sacctmgr", "--immediate", "rollup", first, last])
    what = ["--tres=node,gres/gpu", "cluster", "AccountUtilizationByUser", f"start={first}", f"end={last}"]
    rows = [row.split("|") for row in database.run(["sreport", "-nP", "-t", "seconds", *what]).stdout.splitlines()]
    found = {(row[1], row[2], row[4]): int(row[5]) for row in rows if row[1] in (LIMITED, UNLIMITED) and row[2]}
    return {what: number for what, number in found.items() if number}


def seconds_of(entries: list[Entry]) -> dict[tuple[str, str, str], int]:
    """The same, by the ledger."""
    found = {}
    for (project, user), used in sum_by(entries, ["project", "user"]):
        assert used.node_hours is not None
        assert used.gpu_hours is not None
        found[project, user, "node"] = round(used.node_hours * HOUR)
        found[project, user, "gres/gpu"] = round(used.gpu_hours * HOUR)
    return {what: number for what, number in found.items() if number}


@pytest.fixture
def hide(site: SimulatedSite) -> Iterator[Callable[[str], None]]:
    """`hide("jobs")` has both of Slurm's daemons hide that from users (PrivateData)."""
    folder = site.layout.machine_etc / "slurm"
    before = {path: path.read_text() for path in (folder / "slurm.conf", folder / "slurmdbd.conf")}

    def restart(what: str) -> None:
        for path, text in before.items():
            path.write_text(f"{text}PrivateData={what}\n")
        for daemon in (site.cluster.accounting, site.cluster.controller):
            daemon.stop()
            daemon.start()

    yield restart
    restart("none")


def limited(usage: Usage, project: str = LIMITED) -> Budget:
    found = budgets_of(usage, PROJECT.load_settings(supercomputer=True))
    return next(budget for budget in found if budget.project == project)


def submit(
    site: SimulatedSite, project: str, gpus: int, script: str, *options: str, user: User = CERTIFICATE_USER
) -> int:
    partition = GPU_PARTITION if gpus else CPU_PARTITION
    where = (f"--account={project}", f"--partition={partition}", f"--qos={partition}", "--time=10")
    return site.submit(script, *where, *([f"--gres=gpu:{gpus}"] if gpus else []), *options, user=user)


@pytest.mark.usefixtures("on_supercomputer", "projects")
def test_the_ledger_agrees_with_sreport(
    site: SimulatedSite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A job of an asset, an array job without a comment, a requeued job of two lives, a job of another's project."""

    begin = int(time.time()) // HOUR * HOUR
    since = datetime.fromtimestamp(begin, UTC)
    with open_runs(PROJECT.load_settings(supercomputer=True), PROJECT) as runs:
        before = limited(runs.gateway.usage(since))
        assert (before.limit, before.used, before.source) == (10, 0, f"GrpTRESMins of {LIMITED}")
        again = submit(site, LIMITED, 2, TWO_LIVES, "--job-name=again")
        submit(site, LIMITED, 4, "sleep 17", f"--job-name={KEY}", f"--comment=key={KEY},asset=my_asset")
        submit(site, LIMITED, 1, "sleep 3", f"--job-name={KEY}", "--array=0-1")
        submit(site, UNLIMITED, 0, "sleep 3", "--nodes=2", user=PLAIN_KEY_USER)
        site.wait_for_job(again, "RUNNING")
        ran = ("--noheader", f"--jobs={again}", "--format=%M")
        wait_until(lambda: site.squeue(*ran) >= "0:02", "two seconds of the first life")
        running = limited(runs.gateway.usage(None)).running
        assert running is not None
        assert running > 2 * 8 / 60  # 2 GPUs for most of ten minutes
        site.faults.requeue_job(again)
        wait_until(lambda: not site.squeue("--noheader"), "the end of all jobs", 90)
        chosen = ["-nPXD", "--starttime=now-2hours", f"--accounts={LIMITED},{UNLIMITED}", "--format=End"]
        wait_until(lambda: len(re.findall(r"\d\n", site.sacct(*chosen))) == 6, "all ends in the accounting")
        usage = runs.gateway.usage(since)
    after = limited(usage)
    assert after.used is not None
    assert after.used >= 1 / 60  # in whole minutes of a GPU
    assert (after.running, after.queued) == (0, 0)
    assert limited(usage, BELOW) == replace(after, project=BELOW)

    entries = make_ledger(usage, PROJECT.load_site("musica"), lambda _: None, since)
    own = [entry for entry in entries if entry.project in (LIMITED, UNLIMITED)]
    reported = sreport(site, begin, int(time.time()) // HOUR * HOUR + HOUR)
    assert seconds_of(own) == reported
    assert set(reported) == {
        (LIMITED, CERTIFICATE_USER.name, "node"),
        (LIMITED, CERTIFICATE_USER.name, "gres/gpu"),
        (UNLIMITED, PLAIN_KEY_USER.name, "node"),
    }
    assert {asset: used.jobs for (asset,), used in sum_by(own, ["asset"])} == {"my_asset": 1, UNKNOWN: 2, OTHER: 3}

    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", "scripts/costs --by user,project".split())
    assert costs.main(PROJECT) == 0
    said = capsys.readouterr().out
    assert f"of 10 GPU-hours are left (GrpTRESMins of {LIMITED})." in said
    assert re.search(rf"{CERTIFICATE_USER.name} +{LIMITED} +5 ", said)
    assert re.search(rf"{PLAIN_KEY_USER.name} +{UNLIMITED} +1 ", said)
    with site.faults.accounting_off():
        assert costs.main(PROJECT) == 1
    said = capsys.readouterr().out
    assert "not known: sacct: " in said
    assert not re.search(r"(?<![\d.])0(?!\.?\d)", said)  # a number that is not known is not 0
    print("seconds, by sreport and by the ledger:", reported)  # for people: -s shows it


@pytest.mark.usefixtures("on_supercomputer", "projects")
def test_a_user_who_may_not_see_the_jobs_of_others(
    site: SimulatedSite,
    hide: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """What others wait for is not known, and is not 0; with `usage`, nor is the limit. The rest is right."""
    begin = datetime.fromtimestamp(int(time.time()) // HOUR * HOUR, UTC)
    hide("jobs,users")
    others = submit(site, LIMITED, 1, "sleep 600", user=PLAIN_KEY_USER)
    submit(site, LIMITED, 4, "sleep 600", "--hold", user=PLAIN_KEY_USER)
    submit(site, LIMITED, 2, "sleep 600", "--hold")
    own = submit(site, UNLIMITED, 1, "sleep 600")
    for job in (others, own):
        site.wait_for_job(job, "RUNNING")
    known = ["-nPX", "--allusers", f"--accounts={LIMITED},{UNLIMITED}", "--state=RUNNING", "--format=JobID"]
    wait_until(lambda: len(site.sacct(*known).split()) == 2, "both jobs in the accounting")
    with open_runs(PROJECT.load_settings(supercomputer=True), PROJECT) as runs:
        usage = runs.gateway.usage(begin)
        hide("accounts,jobs,usage,users")
        less = runs.gateway.usage(begin)
    assert usage.private
    for each in (usage, less):
        assert {job.user for job in each.jobs or ()} == {CERTIFICATE_USER.name}
        assert {jobs.user for jobs in each.queue or ()} == {CERTIFICATE_USER.name}
        assert [job.job for job in each.jobs or () if job.project == UNLIMITED] == [str(own)]
    budget = limited(usage)
    assert (budget.limit, budget.user) == (10, "")
    assert budget.queued == pytest.approx(2 / 6)  # the user's own
    assert budget.used is not None
    assert budget.running is not None
    assert budget.used + budget.running == pytest.approx(1 / 6, abs=1 / 60)  # the other user's
    assert pace_of(usage, budget) is None
    assert "waiting jobs 0.33 (waiting jobs of others are not known)." in describe(usage, budget)
    assert less.shares is None

    monkeypatch.setenv("SLURM_ACCOUNT", UNLIMITED)
    monkeypatch.setenv("SLURM_BUDGET_GPU_HOURS", "5")
    monkeypatch.setenv("SLURM_BUDGET_START", f"{begin:%Y-%m-%d}")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", "scripts/costs --by user,project".split())
    assert costs.main(PROJECT) == 0
    said = capsys.readouterr().out
    assert "not known: sshare: Slurm hides from you what your projects may use (PrivateData)" in said
    assert f"of 5 GPU-hours are left (SLURM_BUDGET_GPU_HOURS, your own jobs in {UNLIMITED} only)." in said
    assert "Slurm hides the jobs of other users from you: only your own jobs count." in said
    assert PLAIN_KEY_USER.name not in said


@pytest.mark.usefixtures("on_supercomputer", "projects")
def test_of_two_calls_at_the_same_moment_one_is_refused_where_both_exceed_what_is_left(
    site: SimulatedSite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And so is an array, all of whose tasks count, while the job of the other one runs."""
    monkeypatch.setenv("SLURM_KEEP_WITHIN_BUDGET", "true")
    request = SlurmRequest(account=LIMITED, gpus_per_node=1, time_limit="06:00:00")
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    calls = [Background(partial(materialize, WAITS, folder, request=request)) for folder in folders]
    only_job(site, "RUNNING")
    wait_until(lambda: any(call.ended for call in calls), "the end of one call", 60)
    an_hour = request.model_copy(update={"time_limit": timedelta(hours=1)})
    array = ArrayAsset(tmp_path / "array", "pass", JobArray(), request=an_hour).run(*DAYS.get_partition_keys()[:5:4])
    assert "could cost 5 GPU-hours (5 tasks x 1 node x 1 GPU x 01:00:00)" in array.error
    go_on(site)
    refused, done = sorted((call.outcome() for call in calls), key=lambda outcome: outcome.success)
    assert (refused.success, done.success) == (False, True)
    free = rf"\. Project {LIMITED} has [34][.\d]* free: of 10 GPU-hours"
    assert re.search(rf"could cost 6 GPU-hours \(1 node x 1 GPU x 06:00:00\){free}", refused.error)
