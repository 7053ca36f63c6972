"""Submitting and following on the real Slurm, over the real SSH, whatever happens in between."""

import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from resources import SUPERCOMPUTER_SITE_OVERRIDES
from resources.auth import ensure_certificate
from resources.settings import Settings
from resources.slurm import SlurmRequest, allocate, load_site, render_job_script
from resources.slurm.gateway import Gateway, JobEnd, JobState, RefusedError, StoppedError, ssh_channel
from tests.simulated_site import CERTIFICATE_USER, TCSH_USER, SimulatedSite, wait_until
from tests.simulated_site.faults import SbatchFault

pytestmark = pytest.mark.cluster
SITE = load_site(SUPERCOMPUTER_SITE_OVERRIDES, "musica")
LINES = 'i=0; while [ $i -lt 20000 ]; do echo "line $i äöü"; i=$((i+1)); done'


class Run:
    """A run on the site: its files, and what came of it."""

    def __init__(self, body: str) -> None:
        self.key = f"test-{secrets.token_hex(4)}"
        self.path = f"{CERTIFICATE_USER.home}/dagster-slurm/runs/{self.key}"
        wanted = SlurmRequest(time_limit="5")
        complete = allocate(wanted, SITE, qos="dev_zen4_0768").request
        script = render_job_script(complete, SITE, job_name=self.key, environment={}, body=body)
        self.files = {"job.sh": script}
        self.stdout, self.stderr, self.messages = bytearray(), bytearray(), bytearray()
        self.states: list[JobState] = []

    @property
    def sinks(self) -> dict[str, Callable[[bytes], None]]:
        return {"stdout": self.stdout.extend, "stderr": self.stderr.extend, "messages.jsonl": self.messages.extend}


@pytest.fixture
def settings(site: SimulatedSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    (tmp_path / ".ssh").mkdir()
    shutil.copy(site.login.known_hosts, tmp_path / ".ssh" / "known_hosts")
    monkeypatch.setenv("HOME", str(tmp_path))
    return Settings.model_validate(site.environment())


@pytest.fixture
def gateway(settings: Settings) -> Iterator[Gateway]:
    made = Gateway(ssh_channel(settings, "python3", ensure_certificate))
    yield made
    made.close()


def submit(gateway: Gateway, run: Run) -> str:
    return gateway.submit(run.path, run.files, []).job


def follow(gateway: Gateway, run: Run) -> JobEnd:
    return gateway.follow(run.path, run.sinks, run.states.append)


def jobs_named(site: SimulatedSite, run: Run) -> list[str]:
    return site.squeue("--noheader", "--states=all", f"--name={run.key}", "--format=%i").split()


def nobody_left(site: SimulatedSite) -> None:
    wait_until(lambda: not site.processes_on_login(), "no process on the login nodes", 10)


def test_a_run_from_submission_to_its_end(gateway: Gateway, site: SimulatedSite) -> None:
    run = Run(f"{LINES}; echo to stderr >&2; echo '{{}}' >> messages.jsonl; exit 3")
    first = gateway.submit(run.path, run.files, [])
    assert first.how == "submitted"
    end = follow(gateway, run)
    assert (end.code, end.short) == (3, {})
    assert run.stdout.decode().splitlines() == [f"line {i} äöü" for i in range(20000)]
    assert run.stderr.decode() == "to stderr\n"
    assert run.messages.decode() == "{}\n"
    assert run.states[-1].state == "RUNNING"
    again = gateway.submit(run.path, run.files, [])
    assert (again.job, again.how) == (first.job, "recorded")
    assert jobs_named(site, run) == [first.job]
    mode = site.run_on_login(CERTIFICATE_USER, f"stat -c %a {run.path}").stdout.strip()
    assert mode == "700"
    gateway.close()
    nobody_left(site)


def test_a_refusal_is_final_and_in_slurms_words(gateway: Gateway, site: SimulatedSite) -> None:
    run = Run("true")
    with pytest.raises(RefusedError, match="Invalid qos specification"):
        gateway.submit(run.path, run.files, ["--qos=admin"])
    with pytest.raises(RefusedError, match="is there already, with other content"):
        gateway.submit(run.path, {"job.sh": "#!/bin/sh\n"}, [])
    assert submit(gateway, run)  # corrected


def test_cancelled_and_gone(gateway: Gateway, site: SimulatedSite) -> None:
    run = Run("sleep 300")
    job = submit(gateway, run)
    site.wait_for_job(int(job), "RUNNING")
    assert gateway.cancel(run.path) == "CANCELLED"
    assert site.job_state(int(job)) == "CANCELLED"
    end = follow(gateway, run)
    assert (end.code, end.state) == (None, "CANCELLED")


def test_a_wait_that_is_stopped_leaves_the_job_alone(settings: Settings, site: SimulatedSite) -> None:
    stop = threading.Event()
    gateway = Gateway(ssh_channel(settings, "python3", ensure_certificate), stop)
    run = Run("echo begun; sleep 300")
    job = submit(gateway, run)
    site.wait_for_job(int(job), "RUNNING")
    threading.Timer(0.5, stop.set).start()
    with pytest.raises(StoppedError):
        follow(gateway, run)
    assert site.job_state(int(job)) == "RUNNING"
    assert gateway.cancel(run.path) == "CANCELLED"
    gateway.close()


@pytest.mark.parametrize("drops", [12])
def test_dropped_again_and_again_each_line_comes_once(settings: Settings, site: SimulatedSite, drops: int) -> None:
    told: list[str] = []
    gateway = Gateway(ssh_channel(settings, "python3", ensure_certificate), on_trouble=told.append)
    run = Run(f"for round in 1 2 3 4 5 6; do {LINES}; sleep 0.5; done")
    over = threading.Event()

    def disturb() -> None:
        for _ in range(drops):
            if not over.wait(0.4):
                site.faults.drop_connections()

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        submit(gateway, run)
        end = gateway.follow(run.path, run.sinks, run.states.append)
    finally:
        over.set()
        thread.join()
        gateway.close()
    assert end.code == 0
    assert run.stdout.decode().splitlines() == 6 * [f"line {i} äöü" for i in range(20000)]
    assert len(told) >= 3
    assert len(jobs_named(site, run)) == 1
    nobody_left(site)


def test_refused_for_a_while(settings: Settings, site: SimulatedSite) -> None:
    gateway = Gateway(ssh_channel(settings, "python3", ensure_certificate))
    run = Run("sleep 2; echo done")
    submit(gateway, run)
    gateway.close()
    with site.faults.ssh_refused():
        thread = threading.Thread(target=follow, args=(gateway, run))
        thread.start()
        begun = time.monotonic()
        wait_until(lambda: time.monotonic() - begun > 5, "five seconds without a way in", 10)
    thread.join(60)
    assert not thread.is_alive()
    assert run.stdout == b"done\n"
    gateway.close()


@pytest.mark.parametrize(
    ("kind", "how"),
    [("error-after", {"found", "recorded"}), ("error-before", {"submitted"}), ("slow", {"submitted"})],
)
def test_sbatch_that_lies_is_looked_behind(
    gateway: Gateway, site: SimulatedSite, kind: SbatchFault, how: set[str]
) -> None:
    run = Run("echo once")
    with site.faults.sbatch(kind):
        threading.Timer(3, site.faults.mend_all).start()
        job = gateway.submit(run.path, run.files, [])
    assert job.how in how  # recorded: the job itself was faster
    follow(gateway, run)
    assert run.stdout == b"once\n"
    assert jobs_named(site, run) == [job.job]


def test_a_shell_that_is_not_bash(site: SimulatedSite, settings: Settings, tmp_path: Path) -> None:
    site.mint_certificate(tmp_path / "id_tcsh", TCSH_USER)
    changes = {"edge_node_user": TCSH_USER.name, "edge_node_key_path": tmp_path / "id_tcsh"}
    gateway = Gateway(ssh_channel(settings.model_copy(update=changes), "python3", lambda _: None))
    run = Run("echo from tcsh")
    run.path = f"{TCSH_USER.home}/with space, 'quote' and $HOME/runs/{run.key}"
    submit(gateway, run)
    follow(gateway, run)
    assert run.stdout == b"from tcsh\n"
    gateway.close()
