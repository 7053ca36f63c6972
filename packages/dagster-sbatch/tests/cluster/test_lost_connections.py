"""`compute.run` while the way to the login nodes is disturbed: nothing is lost or repeated, and one job runs."""

import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import pytest

from dagster_sbatch.run import remote_step, reports
from dagster_sbatch.slurm import SlurmRequest
from dagster_sbatch.slurm.gateway import channel, link
from slurm_in_a_box import CERTIFICATE_USER, CPU_PARTITION, TCSH_USER, SimulatedSite, wait_until
from support.background import (
    REPORTS,
    STRESS,
    WAITS,
    Background,
    go_on,
    logins,
    nobody_left,
    one_job_did_it,
    only_job,
    pause,
)
from support.ray_run import nothing_is_left
from support.workload_asset import PIPES, materialize

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("on_supercomputer")]
REQUEST = SlurmRequest(time_limit="00:30:00")
LOGIN_SECONDS = 30.0
"""After which a connection is dropped that has not come to its login."""


@contextmanager
def drops(site: SimulatedSite, times: int) -> Iterator[threading.Event]:
    """All connections are dropped so often, each time a moment after a login; the event is set after the last time."""
    over, done, first = threading.Event(), threading.Event(), logins(site)

    def disturb() -> None:
        known = first
        for _ in range(times):
            deadline = time.monotonic() + LOGIN_SECONDS
            while logins(site) == known and time.monotonic() < deadline and not over.wait(0.05):
                pass
            if over.wait(random.uniform(0, 0.5)):
                return
            known = logins(site)
            site.faults.drop_connections()
        done.set()

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


def write_log(lines: int) -> str:
    """A workload that writes lines of every kind until a test calls `go_on`."""
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
    monkeypatch.setattr(link, "LONGEST_PAUSE", 1.0)
    with site.faults.sbatch("slow"), drops(site, 20) as dropped:
        run = Background(lambda: materialize(write_log(lines), workloads, request=REQUEST))
        assert dropped.wait(300)
        go_on(site)
        outcome = run.outcome(180)
    one_job_did_it(site, outcome)
    assert capfd.readouterr().out.split("\n") == [*expected_log(lines), ""]
    after = logins(site)
    assert sum(after.values()) - sum(before.values()) >= 10
    assert all(after[node] > before[node] for node in after), "the name went to one login node only"
    nothing_is_left(site)
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
    site: SimulatedSite,
    workloads: Path,
    client_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A wrong ~/.ssh/config, then a login node that is not trusted; a check says so, and that it is over."""
    reported: list[tuple[bool, str]] = []
    report = reports.report_reachable

    def note(context: dg.OpExecutionContext, *, passed: bool, description: str) -> None:
        reported.append((passed, description))
        report(context, passed=passed, description=description)

    monkeypatch.setattr(remote_step, "report_reachable", note)
    run = Background(lambda: materialize(WAITS, workloads, request=REQUEST))
    job = only_job(site, "RUNNING")
    shown: list[str] = []

    def follows() -> bool:
        shown.append(capfd.readouterr().out)
        return "begun" in "".join(shown)

    wait_until(follows, "the step follows it")
    config, known = client_home / ".ssh" / "config", client_home / ".ssh" / "known_hosts"
    trusted = known.read_text()
    config.write_text("Host *\n  Port none\n")
    known.write_text("")
    site.faults.drop_connections()
    wait_until(lambda: any("is not a port" in text for _, text in reported), "the wrong Port is reported")
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
        monkeypatch.setattr(channel, "PING_SECONDS", 1.0)
        monkeypatch.setattr(channel, "DEAD_SECONDS", 3.0)
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
    with site.faults.login_slow(bandwidth=4_000_000), drops(site, 4) as dropped:
        run = Background(lambda: materialize(workload, workloads, request=REQUEST))
        assert dropped.wait(180)
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

    wait_until(refused, "the end of the first certificate", 60)
    site.faults.drop_connections()
    wait_until(lambda: certificate.read_text() != first, "a new certificate")
    go_on(site)
    one_job_did_it(site, run.outcome())
