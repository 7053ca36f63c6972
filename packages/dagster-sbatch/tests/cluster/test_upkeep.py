"""Runs and jobs that were left behind: what Dagster's sensors do about them, and what people can with scripts/job."""

import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest

from dagster_sbatch.inspect.diagnosis import examine
from dagster_sbatch.inspect.remote_runs import RunRecord, open_runs
from dagster_sbatch.upkeep import cleaning, orphans, ownership
from dagster_sbatch.upkeep.cleaning import make_cleaning_sensor
from dagster_sbatch.upkeep.orphans import make_orphan_sensor
from resources import PROJECT
from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite, wait_until
from slurm_in_a_box.slurm_configuration import ACCOUNT, SPENT_ACCOUNT
from support import ROOT, forked
from support.forked import Forked
from support.instances import make_instance

pytestmark = pytest.mark.cluster

PROGRAM = """\
import sys
from pathlib import Path
import dagster as dg
from resources import build_resources
from dagster_sbatch.launchers import ScriptLauncher
from dagster_sbatch.slurm import SlurmRequest

@dg.asset
def probe(context: dg.AssetExecutionContext, compute: dg.ResourceParam[object]) -> dg.MaterializeResult:
    workload = Path(__file__).parent / "workloads" / "workload.py"
    request = SlurmRequest(time_limit="8")
    return compute.run(context, workload=workload, launcher=ScriptLauncher(), request=request).get_materialize_result()

def make_job():
    job = dg.define_asset_job("all", selection="*", executor_def=dg.in_process_executor)
    return dg.Definitions(assets=[probe], jobs=[job], resources=build_resources()).resolve_job_def("all")

if __name__ == "__main__":
    options, job = {}, dg.reconstructable(make_job)
    with dg.DagsterInstance.get() as instance:
        if sys.argv[1:]:  # as the UI does it
            parent = instance.get_run_by_id(sys.argv[1])
            options["reexecution_options"] = dg.ReexecutionOptions(parent_run_id=parent.run_id)
            options["tags"] = {"dagster/root_run_id": parent.root_run_id or parent.run_id}
        with dg.execute_job(job, instance, **options) as result:
            raise SystemExit(0 if result.success else 1)
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
    monkeypatch.setattr(ownership, "GRACE", timedelta())
    monkeypatch.setattr(orphans, "LATE", timedelta())


class Dagster:
    """A Dagster instance of its own, and steps of it in processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_instance(folder)
        self.instance = dg.DagsterInstance.from_config(str(folder))
        self.processes: list[Forked] = []
        self.checks: list[tuple[bool, str]] = []

    def start(self, workload: str, *, again: bool = False) -> Forked:
        """Materialise an asset with that workload, in another process; `again` re-executes the latest run."""
        parent = [self.run_id] if again else []
        (self.folder / "workloads").mkdir(exist_ok=True)
        for name, text in (("program.py", PROGRAM), ("workloads/workload.py", workload)):
            (self.folder / name).write_text(text)
        variables = {**os.environ, "DAGSTER_HOME": str(self.folder), "PYTHONPATH": str(ROOT)}
        command = [str(self.folder / "program.py"), *parent]
        process = Forked(command, variables, self.folder / "output", self.folder / "log")
        self.processes.append(process)
        return process

    @property
    def run_id(self) -> str:
        """Of the latest run."""
        return self.instance.get_run_records()[0].dagster_run.run_id

    def status(self) -> dg.DagsterRunStatus:
        """Of the latest run."""
        return self.instance.get_run_records()[0].dagster_run.status

    @property
    def log(self) -> str:
        """What Dagster has logged in the latest run."""
        return (self.folder / "log").read_text()

    def tick(self, cursor: str | None = None) -> tuple[str, str | None]:
        """What the sensor of the orphans says, and its cursor; `checks` has its evaluations."""
        said = make_orphan_sensor(PROJECT)(dg.build_sensor_context(instance=self.instance, cursor=cursor))
        assert isinstance(said, dg.SensorResult)
        assert isinstance(said.skip_reason, dg.SkipReason)
        for event in said.asset_events:
            assert isinstance(event, dg.AssetCheckEvaluation)
            self.checks.append((event.passed, str(event.description)))
        return str(said.skip_reason.skip_message), said.cursor

    def fail_latest_run(self) -> None:
        """As Dagster's run monitoring does, if the run's process is gone."""
        run = self.instance.get_run_by_id(self.run_id)
        assert run is not None
        self.instance.report_run_failed(run)


@pytest.fixture
def make_dagster(tmp_path: Path) -> Iterator[Callable[[str], Dagster]]:
    made: list[Dagster] = []

    def make(name: str) -> Dagster:
        made.append(Dagster(tmp_path / name))
        return made[-1]

    yield make
    for each in made:
        for process in each.processes:
            end(process)
        each.instance.dispose()


def remote_runs() -> list[RunRecord]:
    settings = PROJECT.load_settings()
    with open_runs(settings, PROJECT, 60) as runs:
        return runs.all()


def wait_for_job(site: SimulatedSite, count: int = 1) -> list[RunRecord]:
    """Until so many runs have a job, and all of these run."""
    wait_until(lambda: len([each for each in remote_runs() if each.job]) == count, "the job is there", 60)
    found = remote_runs()
    for each in found:
        site.wait_for_job(int(each.job or 0), "RUNNING")
    return found


def job(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return forked.run([str(ROOT / "scripts" / "job"), *arguments], os.environ)


def end(process: Forked) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def cancel_latest_run(dagster: Dagster) -> None:
    run = dagster.instance.get_run_by_id(dagster.run_id)
    assert run is not None
    dagster.instance.report_run_canceled(run)


@pytest.mark.smoke
def test_a_job_whose_step_failed_is_kept_listed_and_attached_to(
    site: SimulatedSite, make_dagster: Callable[[str], Dagster], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, others = make_dagster("ours"), make_dagster("others")
    process = ours.start(SLEEPER)
    (mine,) = wait_for_job(site)
    number = int(mine.job or 0)
    others.start(SLEEPER)
    theirs = next(each for each in wait_for_job(site, 2) if each.key != mine.key)
    _, cursor = ours.tick()

    # Its process is killed: the job is listed, and not cancelled.
    end(process)
    assert ours.status() == dg.DagsterRunStatus.STARTED
    ours.fail_latest_run()
    listed = (
        f"Slurm job {number} (probe) is RUNNING, and no Dagster run follows it. "
        f"Re-execute run {ours.run_id} to attach to it again, or cancel it:\n  scripts/job {number} cancel"
    )
    said, cursor = ours.tick(cursor)
    assert said == listed
    none_left = (True, "Every job that is waiting or running is followed by a run.")
    assert ours.checks == [none_left, (False, listed.replace("\n", "  \n"))]
    assert ours.tick(cursor) == (said, cursor)  # without asking the supercomputer again
    assert len(ours.checks) == 2
    monkeypatch.setenv("DAGSTER_HOME", str(ours.folder))
    assert listed in job().stdout

    # The re-execution attaches to it. Its step fails, too, since Dagster takes the run for ended.
    process = ours.start(SLEEPER, again=True)
    attached = f"Slurm job {number} was submitted by an earlier run of this step. Attaching to it."
    wait_until(lambda: attached in ours.log, "it attaches", 90)
    said, cursor = ours.tick(cursor)
    assert said == f"run {mine.about.run}: alive"
    assert ours.checks[2:] == [none_left]
    ours.fail_latest_run()
    assert process.wait(90) == 1
    assert f"Slurm job {number} is still running. Re-execute this run to attach to it again." in ours.log
    said, cursor = ours.tick(cursor)
    assert f"Re-execute run {ours.run_id} to attach to it again" in said
    assert site.job_state(number) == "RUNNING"

    # A person terminates the run that has attached again, while nobody can cancel the job.
    process = ours.start(SLEEPER, again=True)
    wait_until(lambda: attached in ours.log and f"job {number}: RUNNING" in ours.log, "it attaches again", 90)
    end(process)
    wait_until(lambda: count_agents(site) == 1, "only the other Dagster's agent is there", 60)
    cancel_latest_run(ours)
    said, cursor = ours.tick(cursor)
    assert said == f"job {number} of run {mine.about.run} (probe): CANCELLED, since its run was terminated"
    assert site.job_state(number) == "CANCELLED"
    assert ours.tick(cursor)[0] == "no run has ended with a job left behind"

    # What another Dagster has submitted is left alone, and reported by the doctor.
    assert site.job_state(int(theirs.job or 0)) == "RUNNING"
    findings = dict(examine(PROJECT, open_instance=lambda: ours.instance))
    assert findings["jobs"].found == f"of runs that this Dagster does not know: {theirs.job} (probe)"
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
        patched.setattr(orphans, "group_state", lambda *_: "over")
        patched.setattr(orphans, "reason_to_cancel", lambda *_: "its run was terminated")
        said, cursor = ours.tick(
            f'{{"since": "{datetime.now(UTC).isoformat()}", "groups": {{"{ours.run_id}": {{}}}}, "report": ""}}'
        )
    assert "acts on it" in said
    assert ours.run_id in str(cursor)
    assert ours.tick(cursor)[0] == f"run {ours.run_id}: alive"
    end(process)
    wait_until(lambda: count_agents(site) == 0, "its agent has left", 60)
    ours.fail_latest_run()
    # A retry is due: Dagster has promised it.
    ours.instance.add_run_tags(ours.run_id, {"dagster/will_retry": "true"})
    said, cursor = ours.tick(cursor)
    assert said == f"run {ours.run_id}: retry due"
    # A re-execution may be on its way.
    ours.instance.add_run_tags(ours.run_id, {"dagster/will_retry": "false"})
    monkeypatch.setattr(ownership, "GRACE", timedelta(hours=1))
    assert ours.tick(cursor)[0] == f"run {ours.run_id}: just ended"
    assert site.job_state(int(mine.job or 0)) == "RUNNING"
    # Without a way to the supercomputer it is kept in mind.
    monkeypatch.setattr(ownership, "GRACE", timedelta())
    monkeypatch.setattr(orphans, "TICK_SECONDS", 2.0)
    with site.faults.ssh_refused():
        said, cursor = ours.tick(cursor)
    assert "has not answered everything within 2 s. Last error: " in said
    monkeypatch.setattr(orphans, "TICK_SECONDS", 40.0)
    cancel_latest_run(ours)
    assert "CANCELLED, since its run was terminated" in ours.tick(cursor)[0]


def test_what_people_can_do_without_ssh(
    site: SimulatedSite, make_dagster: Callable[[str], Dagster], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = make_dagster("ours")
    process = ours.start(QUICK)
    assert process.wait(120) == 0
    (mine,) = remote_runs()
    listed = job().stdout
    assert max(map(len, listed.splitlines())) <= 80
    assert "probe" in listed and ours.run_id[:8] in listed and "COMPLETED 0:0" in listed
    logs = job(ours.run_id[:8], "logs")
    assert (logs.stdout, logs.stderr, logs.returncode) == ("quick\n", "a word\n", 0)
    assert job(mine.key, "logs", "--follow").stdout == "quick\n"
    assert "COMPLETED 0:0" in job(str(mine.job), "state").stdout
    assert job(str(mine.job)).stdout == job(str(mine.job), "state").stdout
    target = tmp_path / "fetched script.sh"
    assert job(str(mine.job), "fetch", "job.sh", "--to", str(target)).returncode == 0
    assert f"key={mine.key}" in target.read_text()
    missing = job(str(mine.job), "fetch", "no such file", "--to", str(target))
    assert (missing.returncode, "No such file" in missing.stderr) == (1, True)
    nowhere = job(str(mine.job), "fetch", "job.sh", "--to", str(tmp_path / "no such folder" / "it"))
    said = f"{tmp_path}/no such folder/it cannot be written: No such file or directory. Name another place with --to.\n"
    assert (nowhere.returncode, nowhere.stderr) == (1, said)
    for code in (0, 1):  # the second time, it is there
        assert job(str(mine.job), "fetch", "job.sh", "--to", str(tmp_path)).returncode == code
    assert (tmp_path / "job.sh").read_text() == target.read_text()
    kept = job(str(mine.job), "fetch", "README.md")
    assert (kept.returncode, "does not overwrite it" in kept.stderr) == (1, True)
    unknown = job("424242", "logs")
    assert unknown.returncode == 1
    assert unknown.stderr.startswith("No run in ") and unknown.stderr.endswith("To list all runs:\n  scripts/job\n")
    # It is cleaned up when it is old.
    assert clean(ours.instance) == "nothing is old enough"
    monkeypatch.setattr(cleaning, "KEEP_DAYS", 0)
    with dg.DagsterInstance.ephemeral() as another:  # does not know whether the result is stored
        assert clean(another) == "nothing is old enough"
    assert clean(ours.instance) == f"removed {mine.key}"
    assert not remote_runs()


def clean(instance: dg.DagsterInstance) -> str:
    said = make_cleaning_sensor(PROJECT)(dg.build_sensor_context(instance=instance))
    assert isinstance(said, dg.SkipReason)
    return str(said.skip_message)


def test_slurm_is_asked_for_the_start_or_the_reason_of_a_refusal() -> None:
    command = [str(ROOT / "scripts" / "preview"), "flights", "--partition", "2013-01", "--test-only"]
    taken = forked.run(command, os.environ)
    assert taken.returncode == 0, taken.stderr
    assert re.search(r" to start at \w{3} \w{3} .* using \d processors", taken.stdout), taken.stdout
    assert f"charged to project {ACCOUNT}\n" in taken.stdout
    environment = {**os.environ, "SLURM_ACCOUNT": SPENT_ACCOUNT}
    refused = forked.run(command, environment)
    assert refused.returncode == 1
    assert "Invalid qos specification" in refused.stdout
    assert f"Project {SPENT_ACCOUNT} may not use QoS dev_zen4_0768, only idle_" in refused.stdout


def count_agents(site: SimulatedSite) -> int:
    commands = [each.command for each in site.processes_on_login()]
    return sum(command.startswith("python3") and "zlib.decompress" in command for command in commands)


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
