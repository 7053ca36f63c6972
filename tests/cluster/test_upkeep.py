"""Runs and jobs that were left behind: what Dagster's sensors do about them, and what people can with scripts/job."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest

from jobs import orphans
from jobs.dead_runs import end_dead_runs_sensor
from jobs.orphans import cancel_orphaned_jobs_sensor, clean_run_directories_sensor
from resources import SUPERCOMPUTER_SITE_OVERRIDES
from resources.doctor import examine
from resources.runs import RunRecord, open_runs
from resources.settings import ROOT, load_settings
from tests.simulated_site import CERTIFICATE_USER, SimulatedSite, wait_until
from tests.simulated_site.slurm_configuration import ACCOUNT, SPENT_ACCOUNT

pytestmark = pytest.mark.cluster

PROGRAM = """\
import sys
from pathlib import Path
import dagster as dg
from resources import build_resources
from resources.launchers import ScriptLauncher
from resources.slurm import SlurmRequest

@dg.asset
def probe(context: dg.AssetExecutionContext, compute: dg.ResourceParam[object]) -> dg.MaterializeResult:
    return compute.run(
        context, workload=Path(sys.argv[1]), launcher=ScriptLauncher(), request=SlurmRequest(time_limit="8")
    ).get_materialize_result()

with dg.DagsterInstance.get() as instance:
    done = dg.materialize([probe], resources=build_resources(), instance=instance, raise_on_error=False)
raise SystemExit(0 if done.success else 1)
"""
SLEEPER = """\
import time
from dagster_pipes import open_dagster_pipes
with open_dagster_pipes() as pipes:
    print("sleeping", flush=True)
    time.sleep(600)
"""
QUICK = """\
import sys
from dagster_pipes import open_dagster_pipes
with open_dagster_pipes() as pipes:
    print("quick")
    print("a word", file=sys.stderr)
"""


@pytest.fixture(autouse=True)
def variables(site: SimulatedSite, client_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user for whom everything works."""
    for name, value in {**site.environment(), "HOME": str(client_home)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(orphans, "GRACE", timedelta())


class Dagster:
    """A Dagster instance of its own, and steps of it in processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
        self.instance = dg.DagsterInstance.from_config(str(folder))
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, workload: str) -> "subprocess.Popen[bytes]":
        """Materialise an asset with that workload, in another process."""
        for name, text in (("program.py", PROGRAM), ("workload.py", workload)):
            (self.folder / name).write_text(text)
        with (self.folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, self.folder / "program.py", self.folder / "workload.py"],
                env={**os.environ, "DAGSTER_HOME": str(self.folder), "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.processes.append(process)
        return process

    @property
    def run_id(self) -> str:
        """Of the only run."""
        (record,) = self.instance.get_run_records()
        return record.dagster_run.run_id

    def status(self) -> dg.DagsterRunStatus:
        """Of the only run."""
        (record,) = self.instance.get_run_records()
        return record.dagster_run.status

    def tick(self, cursor: str | None = None) -> tuple[str, str | None]:
        """What the sensor of the orphans says, and its cursor."""
        said = cancel_orphaned_jobs_sensor(dg.build_sensor_context(instance=self.instance, cursor=cursor))
        assert isinstance(said, dg.SensorResult)
        assert isinstance(said.skip_reason, dg.SkipReason)
        return str(said.skip_reason.skip_message), said.cursor

    def end_dead_runs(self) -> str:
        said = end_dead_runs_sensor(dg.build_sensor_context(instance=self.instance))
        assert isinstance(said, dg.SensorResult)
        assert isinstance(said.skip_reason, dg.SkipReason)
        return str(said.skip_reason.skip_message)


@pytest.fixture
def make_dagster(tmp_path: Path) -> Iterator[Callable[[str], Dagster]]:
    made: list[Dagster] = []

    def make(name: str) -> Dagster:
        made.append(Dagster(tmp_path / name))
        return made[-1]

    yield make
    for each in made:
        for process in each.processes:
            process.kill()
            process.wait()
        each.instance.dispose()


def remote_runs() -> list[RunRecord]:
    settings = load_settings(SUPERCOMPUTER_SITE_OVERRIDES)
    with open_runs(settings, SUPERCOMPUTER_SITE_OVERRIDES, 60) as runs:
        return runs.all()


def wait_for_job(site: SimulatedSite, count: int = 1) -> list[RunRecord]:
    """Until so many runs have a job, and all of these run."""
    wait_until(lambda: len([each for each in remote_runs() if each.job]) == count, "the job is there", 60, interval=1)
    found = remote_runs()
    for each in found:
        site.wait_for_job(int(each.job or 0), "RUNNING")
    return found


def job(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "scripts" / "job"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_run_that_is_killed_is_ended_and_its_job_cancelled(
    site: SimulatedSite, make_dagster: Callable[[str], Dagster]
) -> None:
    ours, others = make_dagster("ours"), make_dagster("others")
    process = ours.start(SLEEPER)
    (mine,) = wait_for_job(site)
    others.start(SLEEPER)
    theirs = next(each for each in wait_for_job(site, 2) if each.key != mine.key)
    assert ours.end_dead_runs() == "every run that has started has a living process"
    _, cursor = ours.tick()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert site.job_state(int(mine.job or 0)) == "RUNNING"
    assert ours.status() == dg.DagsterRunStatus.STARTED
    assert ours.end_dead_runs() == f"ended {ours.run_id}"
    assert ours.status() == dg.DagsterRunStatus.FAILURE
    said, cursor = ours.tick(cursor)
    assert said == f"job {mine.job} of run {ours.run_id} (probe): CANCELLED"
    assert site.job_state(int(mine.job or 0)) == "CANCELLED"
    assert ours.tick(cursor)[0] == "no run has ended with a job left behind"
    # What another Dagster has submitted is left alone, and told by the doctor.
    assert site.job_state(int(theirs.job or 0)) == "RUNNING"
    links = {link.name: link for link in examine(SUPERCOMPUTER_SITE_OVERRIDES, lambda: ours.instance)}
    assert links["jobs"].found == f"of runs that this Dagster does not know: {theirs.job} (probe)"
    assert job(str(theirs.job), "cancel").stdout == f"job {theirs.job}: CANCELLED\n"
    assert site.job_state(int(theirs.job or 0)) == "CANCELLED"


def test_a_job_whose_run_is_alive_or_comes_again_is_left_alone(
    site: SimulatedSite, make_dagster: Callable[[str], Dagster], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = make_dagster("ours")
    process = ours.start(SLEEPER)
    (mine,) = wait_for_job(site)
    # Alive, though an earlier tick has taken it for ended: the claim is the step's.
    with monkeypatch.context() as patched:
        patched.setattr(orphans, "judge", lambda *_: "abandoned")
        said, cursor = ours.tick(f'{{"since": "{datetime.now(UTC).isoformat()}", "roots": ["{ours.run_id}"]}}')
    assert "is at work on it" in said
    assert ours.run_id in str(cursor)
    assert ours.tick(cursor)[0] == f"run {ours.run_id}: alive"
    process.send_signal(signal.SIGKILL)
    process.wait()
    ours.end_dead_runs()
    # A retry is due: Dagster has promised it.
    ours.instance.add_run_tags(ours.run_id, {"dagster/will_retry": "true"})
    said, cursor = ours.tick(cursor)
    assert said == f"run {ours.run_id}: retry due"
    # A re-execution may be on its way.
    ours.instance.add_run_tags(ours.run_id, {"dagster/will_retry": "false"})
    monkeypatch.setattr(orphans, "GRACE", timedelta(hours=1))
    assert ours.tick(cursor)[0] == f"run {ours.run_id}: just ended"
    assert site.job_state(int(mine.job or 0)) == "RUNNING"
    # Without a way to the supercomputer it is kept in mind.
    monkeypatch.setattr(orphans, "GRACE", timedelta())
    monkeypatch.setattr(orphans, "TICK_SECONDS", 2.0)
    with site.faults.ssh_refused():
        said, cursor = ours.tick(cursor)
    assert "(after 2 s)" in said
    monkeypatch.setattr(orphans, "TICK_SECONDS", 40.0)
    assert "CANCELLED" in ours.tick(cursor)[0]


def test_what_people_can_do_without_ssh(
    site: SimulatedSite, make_dagster: Callable[[str], Dagster], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = make_dagster("ours")
    process = ours.start(QUICK)
    assert process.wait(120) == 0
    (mine,) = remote_runs()
    listed = job().stdout
    assert "probe" in listed and ours.run_id[:8] in listed and "COMPLETED 0:0" in listed
    said = job(ours.run_id[:8], "logs")
    assert (said.stdout, said.stderr, said.returncode) == ("quick\n", "a word\n", 0)
    assert job(mine.key, "logs", "--follow").stdout == "quick\n"
    assert "COMPLETED 0:0" in job(str(mine.job), "state").stdout
    target = tmp_path / "fetched script.sh"
    assert job(str(mine.job), "fetch", "job.sh", "--to", str(target)).returncode == 0
    assert f"key={mine.key}" in target.read_text()
    missing = job(str(mine.job), "fetch", "no such file", "--to", str(target))
    assert (missing.returncode, "No such file" in missing.stderr) == (1, True)
    kept = job(str(mine.job), "fetch", "README.md")
    assert (kept.returncode, "would be overwritten" in kept.stderr) == (1, True)
    unknown = job("424242", "logs")
    assert unknown.returncode == 1
    assert "no run in" in unknown.stderr and "scripts/job lists all" in unknown.stderr
    # It is cleaned up when it is old.
    assert clean(ours.instance) == "nothing is old enough"
    monkeypatch.setattr(orphans, "KEEP_DAYS", 0)
    with dg.DagsterInstance.ephemeral() as another:  # does not know whether the result is stored
        assert clean(another) == "nothing is old enough"
    assert clean(ours.instance) == f"removed {mine.key}"
    assert not remote_runs()


def clean(instance: dg.DagsterInstance) -> str:
    said = clean_run_directories_sensor(dg.build_sensor_context(instance=instance))
    assert isinstance(said, dg.SkipReason)
    return str(said.skip_message)


def test_slurm_is_asked_for_the_start_or_the_reason_of_a_refusal() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "preview"), "flights", "--partition", "2013-01", "--test-only"]
    taken = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert taken.returncode == 0, taken.stderr
    assert re.search(r" to start at \w{3} \w{3} .* using \d processors", taken.stdout), taken.stdout
    assert f"charged to project {ACCOUNT}\n" in taken.stdout
    environment = {**os.environ, "SLURM_ACCOUNT": SPENT_ACCOUNT}
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 1
    assert "Invalid qos specification" in refused.stdout
    assert f"Project {SPENT_ACCOUNT} may not use QoS dev_zen4_0768, only idle_" in refused.stdout


def count_agents(site: SimulatedSite) -> int:
    return sum("zlib.decompress" in each.command for each in site.processes_on_login())


def test_the_logs_of_a_running_job_are_followed_to_its_end(
    site: SimulatedSite, make_dagster: Callable[[str], Dagster]
) -> None:
    ours = make_dagster("ours")
    ours.start(SLEEPER)
    (mine,) = wait_for_job(site)
    found: list[subprocess.CompletedProcess[str]] = []
    thread = threading.Thread(target=lambda: found.append(job(str(mine.job), "logs", "--follow")))
    thread.start()
    wait_until(lambda: count_agents(site) == 2, "the follower is there, beside the step", 60)
    stdout = f"cat {mine.path}/stdout"
    wait_until(lambda: site.run_on_login(CERTIFICATE_USER, stdout, check=False).stdout, "the job has written", 60)
    assert job(ours.run_id, "cancel").returncode == 0
    thread.join(60)
    (followed,) = found
    assert (followed.returncode, followed.stdout) == (0, "sleeping\n"), followed.stderr
