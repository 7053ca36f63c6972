"""`compute.run` while something goes wrong on the way to the supercomputer, or on it: nothing lost, nothing doubled."""

import random
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import pytest

from dagster_sbatch.run import remote, reports
from dagster_sbatch.slurm import SlurmRequest
from dagster_sbatch.slurm.gateway import link
from slurm_in_a_box import CERTIFICATE_USER, CPU_PARTITION, TCSH_USER, SimulatedSite, wait_until
from slurm_in_a_box.faults import SbatchFault
from support.background import (
    REPORTS,
    SLEEPS,
    STRESS,
    WAITS,
    Background,
    events,
    go_on,
    jobs_of,
    logins,
    nobody_left,
    only_job,
    output_there,
    rows_of,
    runs_there,
)
from support.workload_asset import PIPES, Outcome, materialize

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("on_supercomputer")]
REQUEST = SlurmRequest(time_limit="00:30:00")
LOGIN_SECONDS = 3.0
"""After which a connection is dropped that has not come to its login."""


def one_job_did_it(site: SimulatedSite, outcome: Outcome) -> None:
    """The run succeeded, at the first attempt, with one job."""
    assert outcome.error == ""
    assert outcome.retries == []
    (metadata,) = outcome.materializations[None]
    assert jobs_of(site, metadata["run_directory"]) == [str(metadata["job_id"])]
    assert len(runs_there(site)) == 1


def pause(seconds: float) -> None:
    """Let a fault last; nothing in it can be waited for."""
    threading.Event().wait(seconds)


@contextmanager
def drops(site: SimulatedSite, times: int) -> Iterator[threading.Event]:
    """All connections are dropped so often, each time a moment after a login; the event is set after the last time."""
    over, done = threading.Event(), threading.Event()

    def disturb() -> None:
        for _ in range(times):
            known, deadline = logins(site), time.monotonic() + LOGIN_SECONDS
            while logins(site) == known and time.monotonic() < deadline and not over.wait(0.05):
                pass
            if over.wait(random.uniform(0, 0.5)):
                return
            site.faults.drop_connections()
        done.set()

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


# ---- the way to the login nodes


def write_log(lines: int) -> str:
    """A workload that writes lines of every kind and goes on until `go_on`."""
    return WAITS.replace(
        "    print(",
        f"""
    import io, sys
    out = io.BufferedWriter(sys.stdout.buffer, 1 << 20)
    special = b"\\n" + b"x" * (1 << 20) + b"\\xff\\xfe\\n"
    for number in range({lines}):
        kind = number % 20_000
        out.write(b"line %d \\xc3\\xa4\\xf0\\x9f\\x98\\x80\\n" % number if kind else special)
        if number % 97 == 0:
            out.write(b"\\n")
        if number % 2_000 == 0:
            out.flush()
            time.sleep(0.04)
    out.detach()  # flushes
    pipes.report_custom_message("half way")
    print(""",
        1,
    )


def expected_log(lines: int) -> Iterator[str]:
    for number in range(lines):
        if number % 20_000:
            yield f"line {number} ä😀"
        else:
            yield from ("", "x" * (1 << 20) + "\ufffd\ufffd")
        if number % 97 == 0:
            yield ""
    yield from ("begun", "gone on")


def test_dropped_before_during_and_after_the_submission_twenty_times(
    site: SimulatedSite, workloads: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log of 200,000 lines, some blank, some of a megabyte, some no UTF-8: each once, in order."""
    before, lines = logins(site), 200_000
    monkeypatch.setattr(link, "MOST_LOGINS", 100)
    with site.faults.sbatch("slow"), drops(site, 20) as dropped:
        run = Background(lambda: materialize(write_log(lines), workloads, request=REQUEST))
        assert dropped.wait(120)
        go_on(site)
        outcome = run.outcome(180)
    one_job_did_it(site, outcome)
    assert capfd.readouterr().out.split("\n") == [*expected_log(lines), ""]
    after = logins(site)
    assert sum(after.values()) - sum(before.values()) >= 10
    assert all(after[node] > before[node] for node in after), "the name went to one login node only"
    nobody_left(site)


def test_refused_for_a_while(site: SimulatedSite, workloads: Path) -> None:
    run = Background(lambda: materialize(WAITS, workloads, request=REQUEST))
    only_job(site, "RUNNING")
    with site.faults.ssh_refused():
        site.faults.drop_connections()
        pause(60 if STRESS else 4)
        go_on(site)
    one_job_did_it(site, run.outcome())


@pytest.mark.smoke
def test_no_error_on_the_way_to_a_job_ends_the_step(
    site: SimulatedSite, workloads: Path, client_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong ~/.ssh/config, then a login node that is not trusted; a check says so, and that it is over."""
    reported: list[tuple[bool, str]] = []
    report = reports.report_reachable

    def note(context: dg.OpExecutionContext, *, passed: bool, description: str) -> None:
        reported.append((passed, description))
        report(context, passed=passed, description=description)

    monkeypatch.setattr(remote, "report_reachable", note)
    run = Background(lambda: materialize(WAITS, workloads, request=REQUEST))
    job = only_job(site, "RUNNING")
    config, known = client_home / ".ssh" / "config", client_home / ".ssh" / "known_hosts"
    trusted = known.read_text()
    config.write_text("Host *\n  Port none\n")
    known.write_text("")
    site.faults.drop_connections()
    wait_until(lambda: any("is no port" in text for _, text in reported), "the wrong Port is reported", 30)
    config.unlink()
    wait_until(lambda: any("is not trusted" in text for _, text in reported), "the host key is reported", 60)
    assert all(f"cannot reach its Slurm job {job}" in text and "scripts/doctor" in text for _, text in reported)
    assert not any(passed for passed, _ in reported)
    assert not run.ended
    go_on(site)
    known.write_text(trusted)
    one_job_did_it(site, run.outcome())
    assert [passed for passed, _ in reported][-1]


def test_refused_when_it_begins(site: SimulatedSite, workloads: Path) -> None:
    with site.faults.ssh_refused():
        run = Background(lambda: materialize(REPORTS, workloads, request=REQUEST))
        pause(3)
    one_job_did_it(site, run.outcome())


def test_frozen_without_being_closed(
    site: SimulatedSite, workloads: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The client gives the connection up and connects anew, beside an agent that knows of nothing."""
    if not STRESS:
        monkeypatch.setattr(link, "PING_SECONDS", 1.0)
        monkeypatch.setattr(link, "DEAD_SECONDS", 3.0)
    run = Background(lambda: materialize(WAITS, workloads, request=REQUEST))
    only_job(site, "RUNNING")
    before = logins(site)
    with site.faults.login_frozen():
        go_on(site)
        pause(90 if STRESS else 8)
        if STRESS:  # tests/unit/test_gateway_agent.py has that with a shorter silence
            assert not [each for each in site.processes_on_login() if "python3" in each.command]
    one_job_did_it(site, run.outcome())
    assert capfd.readouterr().out == "begun\ngone on\n"
    assert sum(logins(site).values()) > sum(before.values())
    nobody_left(site)


@pytest.mark.smoke
def test_dropped_in_the_middle_of_a_large_upload(site: SimulatedSite, workloads: Path) -> None:
    content = bytes(range(256)) * (7 << 12)
    (workloads / "model.bin").write_bytes(content)
    workload = (
        PIPES
        + """
    import hashlib, pathlib
    content = pathlib.Path(__file__).with_name("model.bin").read_bytes()
    pipes.report_asset_materialization(metadata={"hash": hashlib.sha256(content).hexdigest()})
    """
    )
    with site.faults.login_slow(bandwidth=4_000_000):
        run = Background(lambda: materialize(workload, workloads, request=REQUEST))
        with drops(site, 4) as dropped:
            assert dropped.wait(30)
    outcome = run.outcome()
    one_job_did_it(site, outcome)
    left = site.run_on_login(CERTIFICATE_USER, "ls -A dagster-slurm/runs").stdout.split()
    assert not [name for name in left if ".new" in name or ".part" in name]


def test_a_user_whose_shell_is_tcsh(
    site: SimulatedSite, workloads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in site.environment(TCSH_USER).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_QOS", CPU_PARTITION)
    outcome = materialize(REPORTS, workloads, request=REQUEST)
    assert outcome.error == ""
    (metadata,) = outcome.materializations[None]
    assert metadata["run_directory"].startswith(f"{TCSH_USER.home}/dagster-slurm/runs/probe-")


def test_the_certificate_ends_in_mid_run(
    site: SimulatedSite, workloads: Path, tmp_path: Path, on_supercomputer: dict[str, str]
) -> None:
    site.certificate_authority.set_validity("12s")
    key = Path(on_supercomputer["SLURM_EDGE_NODE_KEY_PATH"])
    certificate = key.with_name(f"{key.name}-cert.pub")
    run = Background(lambda: materialize(WAITS, workloads, request=REQUEST))
    only_job(site, "RUNNING")
    first = certificate.read_text()

    copy = tmp_path / "copy"
    shutil.copy(key, copy)
    copy.with_name("copy-cert.pub").write_text(first)
    log_in = site.login.ssh_command(CERTIFICATE_USER, copy, "true")

    def refused() -> bool:
        return subprocess.run(log_in, capture_output=True, timeout=30, check=False).returncode != 0

    wait_until(refused, "the end of the first certificate", 60, 1)
    site.faults.drop_connections()
    wait_until(lambda: certificate.read_text() != first, "a new certificate", 30)
    go_on(site)
    one_job_did_it(site, run.outcome())


# ---- sbatch and the controller


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["error-before", "error-after", "silent-after"])
def test_sbatch_that_lies(kind: SbatchFault, site: SimulatedSite, workloads: Path) -> None:
    with site.faults.sbatch(kind):
        one_job_did_it(site, materialize(REPORTS, workloads, request=REQUEST))


def tried(site: SimulatedSite) -> str:
    return site.run_on_login(CERTIFICATE_USER, "ls dagster-slurm/runs/*", check=False).stdout


def test_the_controller_is_down_at_the_submission_in_mid_run_and_at_the_end(
    site: SimulatedSite, workloads: Path
) -> None:
    before = logins(site)
    with site.faults.controller_down():
        run = Background(lambda: materialize(WAITS, workloads, request=REQUEST))
        wait_until(lambda: "tried" in tried(site), "the first try", 30)
        pause(600 if STRESS else 2)
    only_job(site, "RUNNING", 90)
    with site.faults.controller_down():
        pause(30 if STRESS else 2)
    with site.faults.controller_down():
        go_on(site)
        wait_until(lambda: '"code": 0' in events(site), "the job's own record of its end", 30)
        pause(30 if STRESS else 2)
    one_job_did_it(site, run.outcome())
    assert sum(logins(site).values()) == sum(before.values()) + 1


@pytest.mark.smoke
def test_the_accounting_is_off(site: SimulatedSite, workloads: Path) -> None:
    with site.faults.accounting_off():
        outcome = materialize(REPORTS, workloads, request=REQUEST)
        one_job_did_it(site, outcome)
    (metadata,) = outcome.materializations[None]
    assert metadata["elapsed_seconds"] >= 0
    assert not {"max_rss_mib", "cpu_efficiency"} & set(metadata)


# ---- what happens to nodes and jobs

FIRST_SLEEPS = (
    PIPES
    + """
    import os, pathlib, time
    print(f"life {os.environ.get('SLURM_RESTART_COUNT', 0)} of {pathlib.Path.cwd().name[-1]}", flush=True)
    again = os.environ.get("SLURM_RESTART_COUNT") or not pathlib.Path.cwd().name.endswith("-1")
    pipes.report_asset_materialization(metadata={"rows": 7 if again else 6})
    time.sleep(0 if again else 600)
    """
)
"""Has its result and goes on, in the first life of the first attempt."""


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
        site.wait_for_job(job, "PENDING", timeout=120)
        one_job_did_it(site, run.outcome())
    assert capfd.readouterr().out == "life 0 of 1\nlife 1 of 1\n"


@pytest.mark.smoke
def test_after_a_node_failure_without_requeue_another_attempt_is_made(
    site: SimulatedSite, workloads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "RETRY_SECONDS", 1)
    request = SlurmRequest(time_limit="00:30:00", options=("--no-requeue",))
    run = Background(lambda: materialize(FIRST_SLEEPS, workloads, request=request))
    ((node,),) = rows_of(site, "%N", f"--jobs={began(site)}")
    with site.faults.node_down(node):
        outcome = run.outcome()
    assert outcome.error == ""
    assert len(outcome.retries) == 1
    assert "a node failed (Slurm: NODE_FAIL)" in outcome.retries[0]
    (metadata,) = outcome.materializations[None]
    assert metadata["run_directory"].endswith("-2")
    assert len(runs_there(site)) == 2


def test_attempts_after_node_failures_are_counted(
    site: SimulatedSite, workloads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "RETRY_SECONDS", 1)
    monkeypatch.setattr(remote, "MOST_RETRIES", 1)
    request = SlurmRequest(time_limit="00:30:00", options=("--no-requeue",))
    run = Background(lambda: materialize(SLEEPS, workloads, request=request))
    for attempt in (1, 2):
        wait_until(lambda: output_there(site).count("begun") == attempt, "it runs", 60)  # noqa: B023
        job = only_job(site, "RUNNING")
        ((node,),) = rows_of(site, "%N", f"--jobs={job}")
        with site.faults.node_down(node):
            site.wait_for_job(job, "NODE_FAIL")
    outcome = run.outcome()
    assert len(outcome.retries) == 1
    assert "a node failed (Slurm: NODE_FAIL)" in outcome.error
    assert len(runs_there(site)) == 2


def test_a_job_that_vanishes_without_a_word(site: SimulatedSite, workloads: Path) -> None:
    """Its batch shell is killed: Slurm says FAILED or COMPLETED, and either is an error."""
    run = Background(lambda: materialize(WAITS, workloads, request=REQUEST))
    job = only_job(site, "RUNNING")
    wait_until(lambda: "begun" in output_there(site), "it runs", 30)
    ((node,),) = rows_of(site, "%N", f"--jobs={job}")
    site.run_on_node(node, "kill -KILL $(pgrep -f [s]lurm_script)")
    outcome = run.outcome()
    assert re.search("it recorded no exit code .*, and Slurm reports (FAILED|COMPLETED)", outcome.error)
    go_on(site)


# ---- the disk


def test_a_full_disk_at_the_submission(site: SimulatedSite, workloads: Path) -> None:
    before = rows_of(site, "%i")
    with site.faults.disk_full():
        outcome = materialize(REPORTS, workloads, request=REQUEST)
    assert "refused on the supercomputer" in outcome.error
    assert "No space left on device" in outcome.error
    assert rows_of(site, "%i") == before
    nobody_left(site)


def test_a_disk_that_is_full_in_mid_run(site: SimulatedSite, workloads: Path) -> None:
    workload = WAITS.replace('print("gone on"', 'pathlib.Path("big").write_bytes(bytes(1 << 20)); print("gone on"')
    run = Background(lambda: materialize(workload, workloads, request=REQUEST))
    only_job(site, "RUNNING")
    wait_until(lambda: "begun" in output_there(site), "it runs", 30)
    go_on_there = f"{CERTIFICATE_USER.home}/go-on"
    with site.faults.disk_full():
        (site.layout.home / CERTIFICATE_USER.name / Path(go_on_there).name).touch()  # takes no space
        outcome = run.outcome()
    assert not outcome.success
    assert "No space left on device" in outcome.error or "recorded no exit code" in outcome.error
