"""Every fault shows what it is known to show, and is over when it has been repaired."""

import json
import subprocess
import time
import urllib.error
from pathlib import Path

import pytest

from slurm_in_a_box import (
    CERTIFICATE_USER,
    CPU_PARTITION,
    Disturbance,
    SimulatedSite,
    SiteError,
    wait_until,
)

pytestmark = pytest.mark.cluster

CPU = (f"--partition={CPU_PARTITION}", f"--qos={CPU_PARTITION}", "--time=60")
NODE_FAIL = ("NODE_FAIL|0:0", "NODE_FAIL|1:0")
"""State and exit code of a job on a failed node, in Slurm 22.05 and in 24.11."""
FIFTY_MEGABYTES = "head -c 50000000 /dev/zero"


def running_job(slurm_site: SimulatedSite, *options: str) -> int:
    """Submit a job that does not end, and wait until it runs."""
    job = slurm_site.submit("exec sleep 10000", *CPU, *options)
    slurm_site.wait_for_job(job, "RUNNING")
    return job


def accounted_state(slurm_site: SimulatedSite, job: int, *options: str) -> str:
    """State and exit code of a job as the accounting has them, or an empty string."""
    shown = ["--noheader", "--parsable2", "--allocations", f"--jobs={job}", "--format=State,ExitCode", *options]
    return slurm_site.sacct(*shown).strip()


def wait_accounted(slurm_site: SimulatedSite, job: int, *states: str) -> None:
    """Wait until one of the job's lives has the state in the accounting."""
    wait_until(
        lambda: set(accounted_state(slurm_site, job, "--duplicates").splitlines()) & set(states), f"{states}", 60
    )


def ssh(slurm_site: SimulatedSite, command: str = "hostname", timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a command over SSH."""
    return subprocess.run(
        slurm_site.login_command(command), capture_output=True, text=True, check=False, timeout=timeout
    )


# Machines and network


def test_node_off_ends_its_job_as_node_fail(slurm_site: SimulatedSite) -> None:
    job = running_job(slurm_site, "--nodelist=n4003", "--no-requeue")
    with slurm_site.faults.node_off("n4003"):
        wait_until(lambda: slurm_site.cluster.node_state("n4003") == "down*", "the node down", 120)
        wait_accounted(slurm_site, job, *NODE_FAIL)
    assert slurm_site.cluster.node_state("n4003") == "idle"


def test_node_cut_requeues_its_job_which_completes_elsewhere(slurm_site: SimulatedSite) -> None:
    script = 'test "$SLURM_RESTART_COUNT" && exit; exec sleep 10000'
    job = slurm_site.submit(script, *CPU, "--requeue", "--exclusive")
    slurm_site.wait_for_job(job, "RUNNING")
    node = slurm_site.squeue("--noheader", f"--jobs={job}", "--format=%N").strip()
    with slurm_site.faults.node_cut(node):
        assert slurm_site.machines[node].running
        slurm_site.wait_for_job(job, "PENDING", timeout=120)
        wait_accounted(slurm_site, job, *NODE_FAIL)
        slurm_site.wait_for_job(job, timeout=120)
    assert slurm_site.cluster.node_state(node) == "idle"


@pytest.mark.smoke
def test_node_down_lasts_until_it_is_repaired_though_its_slurmd_registers(slurm_site: SimulatedSite) -> None:
    job = running_job(slurm_site, "--nodelist=n4003", "--no-requeue")

    def slurmd_started() -> str:
        return slurm_site.cluster.query("scontrol", "show", "node", "n4003").partition("SlurmdStartTime=")[2].split()[0]

    with slurm_site.faults.node_down("n4003"):
        wait_accounted(slurm_site, job, *NODE_FAIL)
        before, slurmd = slurmd_started(), slurm_site.cluster.node_daemons["n4003"]
        slurmd.stop()
        slurmd.launch()
        wait_until(lambda: slurmd_started() != before, "the registration of slurmd")
        assert slurm_site.cluster.node_state("n4003") == "down"
    assert slurm_site.cluster.node_state("n4003") == "idle"


def test_login_node_off_leaves_the_other(slurm_site: SimulatedSite) -> None:
    seen = set()
    with slurm_site.faults.node_off("login01"):
        for _ in range(8):
            done = ssh(slurm_site)
            seen.add(done.stdout.splitlines()[-1] if done.returncode == 0 else done.returncode)
        assert seen <= {"login02", 255}
        wait_until(lambda: ssh(slurm_site).returncode == 0, "an answer of login02", 60)
    assert {slurm_site.status()[part] for part in ("machine login01", "sshd-login01")} == {True}


# Slurm


def test_slurmctld_down_is_told_by_squeue_while_sacct_answers_and_jobs_run_on(slurm_site: SimulatedSite) -> None:
    job = running_job(slurm_site)
    wait_accounted(slurm_site, job, "RUNNING|0:0")
    with slurm_site.faults.controller_down():
        asked = slurm_site.run_on_login(CERTIFICATE_USER, "squeue", check=False)
        assert asked.returncode == 1
        assert "Unable to contact slurm controller" in asked.stderr
        accounting = slurm_site.run_on_login(
            CERTIFICATE_USER, f"sacct --noheader --allocations --jobs={job} --format=State"
        )
        assert accounting.stdout.strip() == "RUNNING"
    assert slurm_site.job_state(job) == "RUNNING"


def test_sacct_off(slurm_site: SimulatedSite) -> None:
    with slurm_site.faults.accounting_off():
        asked = slurm_site.run_on_login(CERTIFICATE_USER, "sacct", check=False)
        assert asked.returncode == 1
        assert "Connection refused" in asked.stderr
        job = slurm_site.submit("true", *CPU)
        slurm_site.wait_for_job(job)
    assert accounted_state(slurm_site, job) == "COMPLETED|0:0"


def test_sacct_lagging_answers_with_what_was_before(slurm_site: SimulatedSite) -> None:
    job = running_job(slurm_site)
    wait_accounted(slurm_site, job, "RUNNING|0:0")
    with slurm_site.faults.accounting_lagging():
        slurm_site.faults.cancel_job(job)
        slurm_site.wait_for_job(job, "CANCELLED")
        later = slurm_site.submit("true", *CPU)
        slurm_site.wait_for_job(later)
        assert accounted_state(slurm_site, job) == "RUNNING|0:0"
        assert accounted_state(slurm_site, later) == ""
    assert accounted_state(slurm_site, job).startswith("CANCELLED by 0|")
    assert accounted_state(slurm_site, later) == "COMPLETED|0:0"


@pytest.mark.parametrize(
    ("kind", "accepted"), [("error-before", False), ("error-after", True), ("silent-after", True), ("slow", True)]
)
def test_sbatch_fails_before_or_after_it_has_accepted(slurm_site: SimulatedSite, kind: str, accepted: bool) -> None:
    command = f"sbatch --parsable --job-name={kind} {' '.join(CPU)} --nodes=1 --wrap true"
    with slurm_site.faults.sbatch(kind):  # type: ignore[arg-type]
        asked = slurm_site.run_on_login(CERTIFICATE_USER, f"timeout 5 {command}", check=False)
        jobs = slurm_site.squeue("--noheader", "--states=all", f"--name={kind}", "--format=%i").split()
    assert len(jobs) == accepted
    expected = {"error-before": 1, "error-after": 1, "silent-after": 124, "slow": 0}
    assert asked.returncode == expected[kind]
    assert ("Socket timed out on send/recv operation" in asked.stderr) is kind.startswith("error")
    assert slurm_site.run_on_login(CERTIFICATE_USER, command).returncode == 0


def test_scancel_by_an_admin(slurm_site: SimulatedSite) -> None:
    job = running_job(slurm_site)
    slurm_site.faults.cancel_job(job)
    wait_accounted(slurm_site, job, "CANCELLED by 0|0:15", "CANCELLED by 0|0:0")


def test_requeued_job_runs_again_under_its_id(slurm_site: SimulatedSite) -> None:
    job = running_job(slurm_site)
    slurm_site.faults.requeue_job(job)
    slurm_site.wait_for_job(job, "PENDING")
    assert "BeginTime" in slurm_site.squeue("--noheader", f"--jobs={job}", "--format=%r")
    begun = time.monotonic()
    slurm_site.wait_for_job(job, "RUNNING")
    assert time.monotonic() - begun < 45  # two minutes with Slurm's own setting
    wait_accounted(slurm_site, job, "REQUEUED|0:0")


def test_preempted_job_runs_again(slurm_site: SimulatedSite) -> None:
    job = running_job(slurm_site)
    with slurm_site.faults.preemption(job):
        assert slurm_site.job_state(job) == "PENDING"
        wait_accounted(slurm_site, job, "PREEMPTED|0:0")
    slurm_site.wait_for_job(job, "RUNNING", timeout=90)


# The way to the login nodes


def test_ssh_refused_while_an_open_session_stays(slurm_site: SimulatedSite) -> None:
    with subprocess.Popen(
        slurm_site.login_command("echo open; cat"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as session:
        assert session.stdin and session.stdout
        wait_until(lambda: session.stdout and session.stdout.readline() == "open\n", "the open session")
        with slurm_site.faults.ssh_refused():
            refused = ssh(slurm_site)
            assert refused.returncode == 255
            assert "Connection refused" in refused.stderr
            session.stdin.write("still there\n")
            session.stdin.flush()
            assert session.stdout.readline() == "still there\n"
        assert ssh(slurm_site).returncode == 0
        session.stdin.close()


def test_all_connections_dropped_at_once(slurm_site: SimulatedSite) -> None:
    command = slurm_site.login_command("echo open; exec sleep 1000")
    sessions = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for session in sessions:
        assert session.stdout
        wait_until(lambda out=session.stdout: out.readline() == "open\n", "the open session")  # type: ignore[misc]
    slurm_site.faults.drop_connections()
    for session in sessions:
        _, errors = session.communicate(timeout=30)
        assert session.returncode == 255
        assert "Connection reset by peer" in errors or "Broken pipe" in errors
    assert ssh(slurm_site).returncode == 0


def test_connections_dropped_in_the_middle_of_a_transfer(slurm_site: SimulatedSite) -> None:
    slurm_site.faults.drop_connections(after_bytes=5_000_000)
    done = subprocess.run(slurm_site.login_command(FIFTY_MEGABYTES), capture_output=True, check=False, timeout=60)
    assert done.returncode == 255
    assert 3_000_000 < len(done.stdout) < 6_000_000
    assert ssh(slurm_site).returncode == 0


def test_frozen_login_path_is_neither_closed_nor_passed(slurm_site: SimulatedSite) -> None:
    command = slurm_site.login_command("echo open; cat")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as session:
        assert session.stdin and session.stdout
        wait_until(lambda: session.stdout and session.stdout.readline() == "open\n", "the open session")
        with slurm_site.faults.login_frozen():
            session.stdin.write("on its way\n")
            session.stdin.flush()
            with pytest.raises(subprocess.TimeoutExpired):
                ssh(slurm_site, timeout=3)
            assert session.poll() is None
            assert len(slurm_site.processes_on_login()) > 0
        assert session.stdout.readline() == "on its way\n"
        session.stdin.close()


def test_delay_and_bandwidth_of_the_login_path(slurm_site: SimulatedSite) -> None:
    def seconds(command: str) -> float:
        begun = time.monotonic()
        assert ssh(slurm_site, command).returncode == 0
        return time.monotonic() - begun

    healthy = seconds("true")
    with slurm_site.faults.login_slow(delay=0.1):
        assert seconds("true") > healthy + 0.8  # ssh needs some five round trips
    with slurm_site.faults.login_slow(bandwidth=1_000_000):
        assert seconds("head -c 3000000 /dev/zero") > 2.5


def test_disk_full(slurm_site: SimulatedSite) -> None:
    write = "mkdir -p dagster-slurm && cp /etc/hostname dagster-slurm/ && echo written"
    with slurm_site.faults.disk_full():
        full = slurm_site.run_on_login(CERTIFICATE_USER, write, check=False)
        assert full.returncode != 0
        assert "No space left on device" in full.stderr
        on_node = slurm_site.machines["n4001"].run(["cp", "/bin/true", "true"], CERTIFICATE_USER, check=False)
        assert "No space left on device" in on_node.stderr
    assert slurm_site.run_on_login(CERTIFICATE_USER, write).stdout == "written\n"


# Credentials


def test_certificate_authority_down(slurm_site: SimulatedSite, tmp_path: Path) -> None:
    app_password = slurm_site.authentik.create_token(CERTIFICATE_USER.name, "app_password", "fault")
    with slurm_site.faults.certificate_authority_down():
        failed = slurm_site.certificate_authority.sign_with_step(tmp_path / "id", slurm_site.id_token(app_password))
        assert failed.returncode == 1
    signed = slurm_site.certificate_authority.sign_with_step(tmp_path / "id", slurm_site.id_token(app_password))
    assert signed.returncode == 0, signed.stderr


def test_authentik_down_keeps_its_tokens(slurm_site: SimulatedSite) -> None:
    app_password = slurm_site.authentik.create_token(CERTIFICATE_USER.name, "app_password", "fault")
    with slurm_site.faults.authentik_down(), pytest.raises(urllib.error.URLError, match="Connection refused"):
        slurm_site.id_token(app_password)
    assert slurm_site.id_token(app_password)


def test_authentik_disturbed(slurm_site: SimulatedSite) -> None:
    app_password = slurm_site.authentik.create_token(CERTIFICATE_USER.name, "app_password", "fault")
    with (
        slurm_site.faults.authentik_disturbed(Disturbance("error", status=502)),
        pytest.raises(urllib.error.HTTPError, match="502"),
    ):
        slurm_site.id_token(app_password)
    with slurm_site.faults.authentik_disturbed(Disturbance("slow", seconds=1.5)):
        begun = time.monotonic()
        assert slurm_site.id_token(app_password)
        assert time.monotonic() - begun >= 1.5
    assert [request.status for request in slurm_site.authentik.requests()] == [502, 200]


# All of them


def test_everything_is_repaired_at_once_whoever_broke_it(slurm_site: SimulatedSite) -> None:
    for fault in (
        slurm_site.faults.node_off("n4001"),
        slurm_site.faults.node_cut("n4002"),
        slurm_site.faults.accounting_lagging(),
        slurm_site.faults.controller_down(),
        slurm_site.faults.login_frozen(),
        slurm_site.faults.disk_full(),
        slurm_site.faults.sbatch("error-before"),
        slurm_site.faults.certificate_authority_down(),
        slurm_site.faults.authentik_down(),
    ):
        fault.inject()
    with pytest.raises(SiteError):
        slurm_site.squeue()
    SimulatedSite.running(slurm_site.layout.name).reset()
    assert all(slurm_site.status().values())
    job = slurm_site.submit("hostname", *CPU, "--nodes=4")
    slurm_site.wait_for_job(job)
    assert ssh(slurm_site).returncode == 0
    assert json.loads(slurm_site.squeue("--json"))["errors"] == []
