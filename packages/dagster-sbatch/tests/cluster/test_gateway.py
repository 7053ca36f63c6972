"""Submitting and following on the real Slurm, over the real SSH, whatever happens in between."""

import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dagster_sbatch.auth import ensure_certificate
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import SlurmRequest, allocate, render_job_script
from dagster_sbatch.slurm.gateway import (
    Gateway,
    JobEnd,
    JobState,
    RefusedError,
    StoppedError,
    choose_channel,
    fetch_file,
    send_file,
)
from resources import PROJECT
from slurm_in_a_box import CERTIFICATE_USER, TCSH_USER, SimulatedSite, wait_until
from support.submission import submit_run

pytestmark = pytest.mark.cluster
SITE = PROJECT.load_site("musica")
PYTHONS = ("nosuchpython", "python3")
BROKEN_PYTHON = "#!/bin/sh\\necho libpython is missing >&2\\nexit 127\\n"
HELD_SBATCH = """#!/bin/sh
touch ~/begun
until [ -e ~/go-on ]; do sleep 0.1; done
exec /usr/bin/sbatch "$@"
"""
LINES = 'i=0; while [ $i -lt 20000 ]; do echo "line $i äöü"; i=$((i+1)); done'


class Run:
    """A run on the site: its files, and what came of it."""

    def __init__(self, body: str) -> None:
        self.key = f"test-{secrets.token_hex(4)}"
        self.path = f"{CERTIFICATE_USER.home}/dagster-slurm/runs/{self.key}"
        wanted = SlurmRequest(time_limit="5")
        complete = allocate(wanted, SITE, qos="dev_zen4_0768").request
        script = render_job_script(complete, SITE, job_name=self.key, about={}, environment={}, body=body)
        self.files = {"job.sh": script}
        self.stdout, self.stderr, self.messages = bytearray(), bytearray(), bytearray()
        self.states: list[JobState] = []

    @property
    def sinks(self) -> dict[str, Callable[[bytes], None]]:
        return {"stdout": self.stdout.extend, "stderr": self.stderr.extend, "messages.jsonl": self.messages.extend}


@pytest.fixture
def settings(site: SimulatedSite, client_home: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("HOME", str(client_home))
    return Settings.model_validate(site.environment())


@pytest.fixture
def gateway(settings: Settings) -> Iterator[Gateway]:
    made = Gateway(choose_channel(settings, PYTHONS, ensure_certificate))
    yield made
    made.close()


def follow(gateway: Gateway, run: Run) -> JobEnd:
    return gateway.run(run.path, None, run.sinks, "", on_state=run.states.append)


def jobs_named(site: SimulatedSite, run: Run) -> list[str]:
    return site.squeue("--noheader", "--states=all", f"--name={run.key}", "--format=%i").split()


def nobody_left(site: SimulatedSite) -> None:
    wait_until(lambda: not site.processes_on_login(), "no process on the login nodes")


@pytest.mark.smoke
def test_a_run_from_submission_to_its_end(gateway: Gateway, site: SimulatedSite) -> None:
    run = Run(f"{LINES}; echo to stderr >&2; echo '{{}}' >> messages.jsonl; exit 3")
    first = submit_run(gateway, run.path, run.files)
    assert first.how == "submitted"
    end = follow(gateway, run)
    assert (end.code, end.short) == (3, {})
    assert run.stdout.decode().splitlines() == [f"line {i} äöü" for i in range(20000)]
    assert run.stderr.decode() == "to stderr\n"
    assert run.messages.decode().endswith("\n{}\n")
    assert run.states[-1].state == "RUNNING"
    again = submit_run(gateway, run.path, run.files)
    assert (again.job, again.how) == (first.job, "recorded")
    assert jobs_named(site, run) == [first.job]
    mode = site.run_on_login(CERTIFICATE_USER, f"stat -c %a {run.path}").stdout.strip()
    assert mode == "700"
    gateway.close()
    nobody_left(site)


def test_a_refusal_is_final_and_in_slurms_words(gateway: Gateway, site: SimulatedSite) -> None:
    run = Run("true")
    refused = {"job.sh": run.files["job.sh"].replace("--qos=dev_zen4_0768", "--qos=admin")}
    for _ in range(2):
        with pytest.raises(RefusedError, match="Invalid qos specification"):
            submit_run(gateway, run.path, refused)
    with pytest.raises(RefusedError, match="exists already, with other content"):
        submit_run(gateway, run.path, run.files)


def test_a_wait_that_is_stopped_leaves_the_job_alone(settings: Settings, site: SimulatedSite) -> None:
    stop = threading.Event()
    gateway = Gateway(choose_channel(settings, PYTHONS, ensure_certificate), stop)
    run = Run("echo begun; sleep 300")
    job = submit_run(gateway, run.path, run.files).job
    site.wait_for_job(int(job), "RUNNING")
    threading.Timer(0.5, stop.set).start()
    with pytest.raises(StoppedError):
        follow(gateway, run)
    assert site.job_state(int(job)) == "RUNNING"
    gateway.stop = threading.Event()
    site.run_on_login(CERTIFICATE_USER, f"scontrol update JobId={job} JobName=mine")  # and its user may rename it
    cancelled = gateway.cancel(run.path)
    assert cancelled is not None
    assert cancelled.state == "CANCELLED"
    gateway.close()


def test_a_job_that_its_user_has_renamed_below_a_folder_with_a_space(gateway: Gateway, site: SimulatedSite) -> None:
    """Slurm and its accounting know it by its folder."""
    run = Run("sleep 300")
    run.path = f"{CERTIFICATE_USER.home}/my runs/{run.key}"
    files = {"job.sh": run.files["job.sh"].replace("#SBATCH --time", "#SBATCH --hold\n#SBATCH --time", 1)}
    job = submit_run(gateway, run.path, files).job
    site.run_on_login(CERTIFICATE_USER, f"scontrol update JobId={job} JobName=mine && rm '{run.path}/job'")
    found = submit_run(gateway, run.path, files)  # as after a submission that got no answer
    assert (found.job, found.how) == (job, "found")

    def report(state: JobState) -> None:
        run.states.append(state)
        gateway.stop.set()

    with pytest.raises(StoppedError):
        gateway.run(run.path, None, {}, "", on_state=report)
    assert [(state.state, state.reason) for state in run.states] == [("PENDING", "JobHeldUser")]
    gateway.stop = threading.Event()
    assert gateway.state(run.path)[0] is not None
    cancelled = gateway.cancel(run.path)
    assert cancelled is not None
    assert cancelled.state == "CANCELLED"
    shown = ["-XnP", f"--jobs={job}", "--format=JobName,WorkDir"]
    wait_until(lambda: site.sacct(*shown).strip() == f"mine|{run.path}", "it is in the accounting")


def test_many_at_once_submit_one_job(settings: Settings, site: SimulatedSite) -> None:
    run, found = Run("echo once"), []

    def ask() -> None:
        gateway = Gateway(choose_channel(settings, PYTHONS, ensure_certificate))
        found.append(submit_run(gateway, run.path, run.files))
        gateway.close()

    ensure_certificate(settings)
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len({each.job for each in found}) == 1
    assert sorted(each.how for each in found) == ["recorded", "recorded", "recorded", "submitted"]
    assert len(jobs_named(site, run)) == 1


def test_a_submission_that_hangs_is_not_overtaken(settings: Settings, site: SimulatedSite) -> None:
    """sbatch has submitted and never answers; its agent is gone; a second one waits for it, and finds the job."""
    run = Run("echo once")
    first = Gateway(choose_channel(settings, PYTHONS, ensure_certificate), threading.Event())
    with site.faults.sbatch("silent-after"):

        def ask() -> None:
            with pytest.raises(StoppedError):
                submit_run(first, run.path, run.files)

        thread = threading.Thread(target=ask)
        thread.start()
        wait_until(lambda: jobs_named(site, run), "the job is there")
        first.stop.set()
        thread.join(60)
        first.close()
    second = Gateway(choose_channel(settings, PYTHONS, ensure_certificate))
    end = follow(second, run)
    assert end.code == 0
    assert run.stdout == b"once\n"
    assert len(jobs_named(site, run)) == 1
    second.close()


def test_a_submission_that_is_stopped_cannot_submit_beside_a_new_one(settings: Settings, site: SimulatedSite) -> None:
    """Agent and sbatch are stopped before anything is submitted; a second client asks; then they are let go."""
    home = site.layout.home / CERTIFICATE_USER.name
    site.run_on_login(CERTIFICATE_USER, f"mkdir bin; echo '{HELD_SBATCH}' > bin/sbatch; chmod +x bin/sbatch")
    site.run_on_login(CERTIFICATE_USER, "echo 'PATH=~/bin:$PATH' >> .bashrc")
    run, found = Run("echo once"), []
    first, second = (Gateway(choose_channel(settings, PYTHONS, ensure_certificate)) for _ in range(2))

    def give_up() -> None:
        with pytest.raises(StoppedError):
            submit_run(first, run.path, run.files)

    thread = threading.Thread(target=give_up)
    thread.start()
    wait_until((home / "begun").exists, "sbatch")
    stopped = site.processes_on_login()
    for each in stopped:
        site.run_on_node(each.machine, f"kill -STOP {each.pid}", check=False)
    first.stop.set()
    thread.join(60)
    first.close()
    other = threading.Thread(target=lambda: found.append(submit_run(second, run.path, run.files)))
    other.start()
    other.join(3)
    assert other.is_alive(), "it has not waited for the first"
    assert not jobs_named(site, run)
    (home / "go-on").touch()
    for each in stopped:
        site.run_on_node(each.machine, f"kill -CONT {each.pid}", check=False)
    other.join(60)
    assert [submitted.how for submitted in found] == ["recorded"]
    follow(second, run)
    assert run.stdout == b"once\n"
    assert jobs_named(site, run) == [found[0].job]
    second.close()


@pytest.mark.smoke
def test_state_and_times(gateway: Gateway, site: SimulatedSite) -> None:
    run = Run("sleep 1")
    job = submit_run(gateway, run.path, run.files).job
    end = follow(gateway, run)
    assert (end.state, end.exit) == ("COMPLETED", "0:0")
    assert end.submitted and end.started and end.ended
    assert end.submitted <= end.started < end.ended
    assert gateway.queue(run.path.rpartition("/")[0])["jobs"][job][3] == run.key


@pytest.mark.usefixtures("shells_that_end_at_once")
def test_without_agent_it_is_told_why(site: SimulatedSite, settings: Settings) -> None:
    """A profile that ends the shell leaves nobody to send the agent to."""
    told: list[str] = []
    stop = threading.Event()
    site.run_on_login(CERTIFICATE_USER, "printf 'echo closed for maintenance; exit 1\\n' > ~/.bashrc")
    gateway = Gateway(choose_channel(settings, PYTHONS, ensure_certificate), stop, told.append)

    def ask() -> None:
        with pytest.raises(StoppedError):
            gateway.queue("runs")

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: told, "the client has reported the error")
    stop.set()
    thread.join(60)
    assert "no agent: " in told[0]
    assert "closed for maintenance" in told[0]
    gateway.close()


def test_a_login_node_on_which_no_python_starts_is_an_error(site: SimulatedSite, settings: Settings) -> None:
    """P-17: it was asked again for ever."""
    site.run_on_login(
        CERTIFICATE_USER,
        f"mkdir bin; printf '{BROKEN_PYTHON}' > bin/broken; chmod +x bin/broken; "
        "echo 'PATH=~/bin:$PATH' > .bash_profile",
    )
    gateway = Gateway(choose_channel(settings, ["nosuchpython", "broken"], ensure_certificate))
    with pytest.raises(RefusedError) as raised:
        gateway.queue(Run("").path)
    text = str(raised.value)
    assert "no Python: none of nosuchpython, broken starts on login0" in text
    assert "libpython is missing" in text
    assert "python_candidates of SUPERCOMPUTER_SITE_OVERRIDES" in text


def test_slurm_that_only_login_shells_find(site: SimulatedSite, settings: Settings) -> None:
    """P-17: and a Python that is there and does not start. bash in POSIX mode would read no profile."""
    site.run_on_login(
        CERTIFICATE_USER,
        "mkdir bin; ln -s /usr/bin/* bin; rm bin/sbatch bin/squeue bin/scontrol bin/scancel bin/sacct; "
        f"printf '{BROKEN_PYTHON}' > bin/broken; chmod +x bin/broken; echo 'PATH=~/bin' >> .bashrc; "
        "echo 'export POSIXLY_CORRECT=1' >> .bashrc; echo 'PATH=/usr/bin:/bin; cat >/dev/null' > .bash_profile",
    )
    gateway = Gateway(choose_channel(settings, ["broken", "python3"], ensure_certificate))
    run = Run("echo works")
    assert submit_run(gateway, run.path, run.files)
    assert follow(gateway, run).code == 0
    gateway.close()
    nobody_left(site)


def test_setup_commands_come_before_the_agent(site: SimulatedSite, settings: Settings) -> None:
    """A function of the login profile, a Python that it alone finds, and a user of tcsh."""
    key = site.layout.state / "client" / "id_tcsh"
    changes = {"edge_node_user": TCSH_USER.name, "edge_node_key_path": key}
    site.mint_certificate(key, TCSH_USER)
    site.run_on_login(
        TCSH_USER,
        "mkdir of-module; ln -s /usr/bin/python3 of-module/a-python; "
        """echo 'provide() { [ "$2" = "it'"'"'s!" ] && PATH=$HOME/of-module:$PATH; }' > .bash_profile; """
        "echo 'export SCRATCH=$HOME/scratch' >> .bash_profile",
    )
    setup = ['provide a "it\'s!"', "[ -t 0 ] || cat  # what it reads is not the agent's"]
    channel = choose_channel(settings.model_copy(update=changes), ["a-python"], lambda _: None, setup=setup)
    gateway = Gateway(channel)
    assert gateway.claim("$SCRATCH/runs", "family", "token", "me").runs == f"{TCSH_USER.home}/scratch/runs"
    gateway.close()
    nobody_left(site)


def test_what_is_cancelled_before_it_is_submitted_stays_so(gateway: Gateway, site: SimulatedSite) -> None:
    run = Run("echo never")
    assert gateway.cancel(run.path) is None
    with pytest.raises(RefusedError):
        submit_run(gateway, run.path, run.files)
    assert not jobs_named(site, run)


def test_files_there_and_back_through_lost_connections(gateway: Gateway, site: SimulatedSite, tmp_path: Path) -> None:
    local, back, there = tmp_path / "a file", tmp_path / "back", f"{CERTIFICATE_USER.home}/put here/a $file"
    content = secrets.token_bytes(1 << 20) * 24
    local.write_bytes(content)
    told: list[int] = []
    drops = iter((4 << 20, 9 << 20, 9 << 20))
    due = next(drops)

    def progress(at: int, _: int = 0) -> None:
        nonlocal due
        told.append(at)
        if at > due:
            due = next(drops, 1 << 40)
            site.faults.drop_connections()

    assert len(content) <= send_file(gateway, local, there, progress) < 2 * len(content)
    assert told[-1] == len(content)
    assert send_file(gateway, local, there) == 0
    drops = iter((4 << 20, 9 << 20, 9 << 20))
    due = next(drops)
    fetch_file(gateway, there, back, progress)
    assert back.read_bytes() == content
    with pytest.raises(RefusedError, match="No such file"):
        fetch_file(gateway, f"{there} not", back)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["a file", "back"]
    assert site.run_on_login(CERTIFICATE_USER, "ls -A 'put here'").stdout.splitlines()[-1] == "a $file"
