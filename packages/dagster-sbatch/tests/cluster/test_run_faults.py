"""`compute.run` while Slurm, nodes or the disk fail: nothing is lost or repeated."""

import re
from pathlib import Path

import pytest

from dagster_sbatch.run import remote_job
from dagster_sbatch.slurm import Retries, SlurmRequest
from dagster_sbatch.slurm.gateway import programs
from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite, wait_until
from slurm_in_a_box.faults import SbatchFault
from support.background import (
    REPORTS,
    SLEEPS,
    STRESS,
    WAITS,
    Background,
    attempts_of,
    events,
    go_on,
    kill_on_node,
    logins,
    nobody_left,
    one_job_did_it,
    only_job,
    output_there,
    pause,
    rows_of,
    runs_there,
)
from support.workload_asset import PIPES, materialize

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("on_supercomputer")]
REQUEST = SlurmRequest(time_limit="00:30:00")


# ---- sbatch and the controller


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["error-after", "silent-after"])
def test_sbatch_that_lies(kind: SbatchFault, site: SimulatedSite, workloads: Path) -> None:
    with site.faults.sbatch(kind):
        one_job_did_it(site, materialize(REPORTS, workloads, request=REQUEST))


def tried(site: SimulatedSite) -> str:
    return site.run_on_login(CERTIFICATE_USER, "ls dagster-slurm/runs/*", check=False).stdout


@pytest.mark.timeout(1500 if STRESS else 600)
def test_the_controller_is_down_at_the_submission_in_mid_run_and_at_the_end(
    site: SimulatedSite, workloads: Path
) -> None:
    before = logins(site)
    with site.faults.controller_down():
        run = Background(lambda: materialize(WAITS, workloads, request=REQUEST))
        wait_until(lambda: "tried" in tried(site), "the first try")
        pause(600 if STRESS else 2)
    only_job(site, "RUNNING", 90)
    with site.faults.controller_down():
        pause(30 if STRESS else 2)
    with site.faults.controller_down():
        go_on(site)
        wait_until(lambda: '"code": 0' in events(site), "the job's own record of its end")
        pause(30 if STRESS else 2)
    one_job_did_it(site, run.outcome())
    assert sum(logins(site).values()) == sum(before.values()) + 1


@pytest.mark.smoke
def test_the_accounting_is_off(
    site: SimulatedSite, workloads: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What the project has left is not known then, which refuses nothing."""
    monkeypatch.setenv("SLURM_KEEP_WITHIN_BUDGET", "true")
    with site.faults.accounting_off():
        outcome = materialize(REPORTS, workloads, request=REQUEST)
        one_job_did_it(site, outcome)
    (metadata,) = outcome.materializations[None]
    assert metadata["elapsed_seconds"] >= 0
    assert metadata.get("max_rss_mib") != 0
    assert re.search("SLURM_KEEP_WITHIN_BUDGET: .* The job is submitted", capfd.readouterr().err)


# ---- what happens to nodes and jobs

FIRST_SLEEPS = (
    PIPES
    + """
    import os, pathlib, time
    print(f"life {os.environ.get('SLURM_RESTART_COUNT', 0)} of {pathlib.Path.cwd().parent.name[-1]}", flush=True)
    again = os.environ.get("SLURM_RESTART_COUNT") or not pathlib.Path.cwd().parent.name.endswith("-1")
    pipes.report_asset_materialization(metadata={"rows": 7 if again else 6})
    time.sleep(0 if again else 600)
    """
)
"""Reports its result and keeps running, in the first life of the first attempt."""


def began(site: SimulatedSite) -> int:
    """The job, as soon as its workload has begun."""
    wait_until(lambda: "life 0 of 1" in site.run_on_login(CERTIFICATE_USER, STDOUT, check=False).stdout, "it runs", 60)
    return only_job(site, "RUNNING")


STDOUT = "cat dagster-slurm/runs/*/stdout"


def test_a_requeued_job_is_followed_into_its_second_life(
    site: SimulatedSite, workloads: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Background(lambda: materialize(FIRST_SLEEPS, workloads, request=REQUEST))
    site.faults.requeue_job(began(site))
    outcome = run.outcome()
    one_job_did_it(site, outcome)
    assert outcome.materializations[None][0]["rows"] == 7
    assert capfd.readouterr().out == "life 0 of 1\nlife 1 of 1\n"


def test_a_preempted_job_runs_again(site: SimulatedSite, workloads: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = Background(lambda: materialize(FIRST_SLEEPS, workloads, request=REQUEST))
    with site.faults.preemption(began(site)):
        pass
    one_job_did_it(site, run.outcome())
    assert capfd.readouterr().out == "life 0 of 1\nlife 1 of 1\n"


def test_a_node_fails_and_its_job_runs_again(
    site: SimulatedSite, workloads: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Background(lambda: materialize(FIRST_SLEEPS, workloads, request=REQUEST))
    job = began(site)
    ((node,),) = rows_of(site, "%N", f"--jobs={job}")
    with site.faults.node_off(node) if STRESS else site.faults.node_down(node):
        one_job_did_it(site, run.outcome())
    assert capfd.readouterr().out == "life 0 of 1\nlife 1 of 1\n"


def test_a_node_that_slurm_took_for_dead_does_not_run_on(site: SimulatedSite, workloads: Path) -> None:
    """It is cut off from Slurm, not from the file system, where its messages would mix with those of the next start."""
    workload = WAITS.replace(
        'print("begun"', "import os; print('life', os.environ.get('SLURM_RESTART_COUNT', 0), 'of 1'"
    )
    run = Background(lambda: materialize(workload, workloads, request=REQUEST))
    ((node,),) = rows_of(site, "%N", f"--jobs={began(site)}")
    with site.faults.node_cut(node):
        wait_until(lambda: "life 1 of 1" in output_there(site), "it runs again", 120)
        left = "pgrep --full '[p]robe workload.py'"
        wait_until(lambda: not site.run_on_node(node, left, check=False).stdout, "the first start has ended", 60)
        go_on(site)
        one_job_did_it(site, run.outcome())


@pytest.mark.smoke
def test_after_a_node_failure_without_requeue_another_attempt_is_made(
    site: SimulatedSite, workloads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_job, "RETRY_SECONDS", 1)
    retries = Retries(exclude_failed_nodes=True)
    request = SlurmRequest(time_limit="00:30:00", options=("--no-requeue",), retries=retries)
    run = Background(lambda: materialize(FIRST_SLEEPS, workloads, request=request))
    ((node,),) = rows_of(site, "%N", f"--jobs={began(site)}")
    with site.faults.node_down(node):
        outcome = run.outcome()
    assert (outcome.error, outcome.retries) == ("", [])
    (metadata,) = outcome.materializations[None]
    assert metadata["run_directory"].endswith("-2")
    first, second = attempts_of(metadata)
    assert first["end"].startswith("a node failed (Slurm: NODE_FAIL)")
    assert (second["end"], second["request"]) == ("succeeded", f"time_limit=00:30:00, exclude={node}")
    assert len(runs_there(site)) == 2


def test_attempts_after_node_failures_are_counted(
    site: SimulatedSite, workloads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_job, "RETRY_SECONDS", 1)
    request = SlurmRequest(time_limit="00:30:00", options=("--no-requeue",), retries=Retries(max_retries=1))
    run = Background(lambda: materialize(SLEEPS, workloads, request=request))
    for attempt in (1, 2):
        wait_until(lambda: output_there(site).count("begun") == attempt, "it runs", 60)  # noqa: B023
        job = only_job(site, "RUNNING")
        ((node,),) = rows_of(site, "%N", f"--jobs={job}")
        with site.faults.node_down(node):
            site.wait_for_job(job, "NODE_FAIL")
    outcome = run.outcome()
    assert outcome.retries == []
    assert "a node failed (Slurm: NODE_FAIL). No other attempt follows: max_retries=1" in outcome.error
    assert len(runs_there(site)) == 2


def test_a_job_that_vanishes_without_a_word(site: SimulatedSite, workloads: Path) -> None:
    """Its batch shell is killed: Slurm says FAILED or COMPLETED, and either is an error."""
    run = Background(lambda: materialize(WAITS, workloads, request=REQUEST))
    job = only_job(site, "RUNNING")
    wait_until(lambda: "begun" in output_there(site), "it runs")
    ((node,),) = rows_of(site, "%N", f"--jobs={job}")
    kill_on_node(site, node, "pgrep -f [s]lurm_script")
    outcome = run.outcome()
    assert re.search("it recorded no exit code .*, and Slurm reports (FAILED|COMPLETED)", outcome.error)
    go_on(site)


# ---- the disk


def test_a_full_disk_at_the_submission(site: SimulatedSite, workloads: Path) -> None:
    before = rows_of(site, "%i")
    with site.faults.disk_full():
        outcome = materialize(REPORTS, workloads, request=REQUEST)
    runs = f"{CERTIFICATE_USER.home}/dagster-slurm/runs"
    assert f"refused on the supercomputer: {runs}: No space left on device" in outcome.error
    assert [row for row in rows_of(site, "%i") if row not in before] == []  # the controller may have forgotten others
    nobody_left(site)


def test_a_disk_that_is_full_in_mid_run(site: SimulatedSite, workloads: Path) -> None:
    workload = WAITS.replace('print("gone on"', 'pathlib.Path("big").write_bytes(bytes(1 << 20)); print("gone on"')
    run = Background(lambda: materialize(workload, workloads, request=REQUEST))
    only_job(site, "RUNNING")
    wait_until(lambda: "begun" in output_there(site), "it runs")
    go_on_there = f"{CERTIFICATE_USER.home}/go-on"
    with site.faults.disk_full():
        (site.layout.home / CERTIFICATE_USER.name / Path(go_on_there).name).touch()  # takes no space
        outcome = run.outcome()
    assert not outcome.success
    assert "No space left on device" in outcome.error or "recorded no exit code" in outcome.error


def test_the_run_directory_of_a_running_job_is_removed(
    site: SimulatedSite, workloads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file system is there. Nobody can receive its result, so the job is cancelled."""
    serve, hurry = "names['serve']()", "__import__('agent.location').location.REMOVED = 3"
    assert serve in programs.START
    monkeypatch.setattr(programs, "START", programs.START.replace(serve, f"{hurry}; {serve}"))
    run = Background(lambda: materialize(SLEEPS, workloads, request=REQUEST))
    wait_until(lambda: "begun" in output_there(site), "it runs")
    job = only_job(site, "RUNNING")
    site.run_on_login(CERTIFICATE_USER, "rm -rf dagster-slurm/runs/*")
    error = run.outcome().error
    assert f"the run directory of Slurm job {job} was removed while the job was followed" in error
    assert "It was still running, so it was cancelled, and is over" in error
    assert [str(job), "CANCELLED"] in rows_of(site, "%i %T")
