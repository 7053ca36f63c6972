"""A run directory that disappears while its job is followed: it was removed, or its file system is away."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from dagster_sbatch.run.interrupts import cancel_jobs
from dagster_sbatch.slurm.gateway import Gateway, RemovedError, follow_jobs
from dagster_sbatch.slurm.gateway.agent import run_directories
from slurm_in_a_box import wait_until
from support.agent_fixtures import HURRIED, Prepare, put
from support.array_run import Recorder
from support.array_site import Site, record
from support.played_slurm import PlayedSlurm
from support.step import Step, kill
from support.workload_asset import PIPES, materialize

AGENT = """
import os
with open({pid!r}, "w") as file:
    file.write(str(os.getpid()))
def spoil():
    import sys
    location = sys.modules["agent.location"]
    location.REMOVED, location.MISSING_EVERY = {patience}, 0.02
    stat = os.stat
    def other_devices(path, **named):
        found = stat(path, **named)
        other = str(path) in {above!r}
        return os.stat_result(found[:2] + (found.st_dev + 1,) + found[3:]) if other else found
    os.stat = other_devices
"""


class Job:
    """A job, or a task of an array job, that a test plays."""

    def __init__(self, slurm: Path, folder: Path, *, array: bool) -> None:
        self.base, self.pid, self.array = folder / "base", folder / "pid", array
        self.base.mkdir(mode=0o700)
        self.site, self.slurm = Site(slurm, self.base, 1), slurm
        self.run, self.seen, self.said, self.states = self.site.run, Recorder(self.site.array), bytearray(), list[str]()
        self.run.parent.mkdir(mode=0o700)
        files = self.site.array.files if array else {"job.sh": ""}
        run_directories.lay_out(str(self.run), files)  # type: ignore[no-untyped-call]
        (self.run / "job").symlink_to("17")
        self.show("RUNNING")
        put(slurm, "scancel", f"echo $* >'{slurm}/cancelled'")

    def show(self, state: str, after_scancel: str = "CANCELLED") -> None:
        """Let Slurm show a state; another one once the job was cancelled."""
        lines = [record("0", each) for each in (state, after_scancel)]
        lines = lines if self.array else [line.replace("ArrayTaskId=0", "") for line in lines]
        cancelled = self.slurm / "cancelled"
        put(self.slurm, "scontrol", f"[ -e '{cancelled}' ] && echo '{lines[1]}' || echo '{lines[0]}'")
        name = "17_0" if self.array else "17"
        row = f"echo '{name}|{state}|None|N/A|KEY-1|p1'" if state == "RUNNING" else ""
        put(self.slurm, "squeue", f"echo >>'{self.slurm}/asked'; {row}")

    def wait_for_squeue(self, times: int) -> None:
        """Wait until the agent has asked squeue so many times again."""
        asked = self.slurm / "asked"
        asked.unlink(missing_ok=True)
        wait_until(lambda: asked.exists() and asked.stat().st_size >= times, "squeue is asked", 60)

    def write(self, name: str, text: str) -> None:
        if self.array:
            self.site.write(0, name, text)
        else:
            with (self.run / name).open("a") as file:
                file.write(text)

    def follow(self, gateway: Gateway, follower: str) -> int | None:
        """Follow it to its end; return its exit code."""
        if self.array:
            follow_jobs(gateway, self.seen, follower)
            return self.seen.ends[0].code
        sinks = {"stdout": self.said.extend}
        report = self.states.append
        return gateway.run(str(self.run), None, sinks, follower, on_state=lambda state: report(state.state)).code

    @property
    def text(self) -> str:
        return self.seen.text(0) if self.array else self.said.decode()


@pytest.fixture(params=["job", "array"])
def job(request: pytest.FixtureRequest, slurm: Path, tmp_path: Path) -> Job:
    return Job(slurm, tmp_path, array=request.param == "array")


Begin = Callable[..., Future[int | None]]


@pytest.fixture
def begin(job: Job, prepare: Prepare) -> Iterator[Begin]:
    """`begin(patience, above, troubles)` follows the job in a thread of its own; returns when its output has come."""
    gateways: list[Gateway] = []
    with ThreadPoolExecutor(1) as pool:

        def follow(patience: float, above: list[str], told: list[str], follower: str = "run-1") -> Future[int | None]:
            agent = HURRIED + AGENT.format(pid=str(job.pid), patience=patience, above=above)
            gateways.append(prepare(agent, told))
            gateways[-1].claim(str(job.run.parent), "KEY", "token", "run 1")
            end = pool.submit(job.follow, gateways[-1], follower)
            job.write("events", json.dumps({"started": "n1", "time": 1, "temporary": "/tmp"}) + "\n")
            job.write("stdout", "first\n")
            wait_until(lambda: job.text == "first\n", "its output has come", 60)
            return end

        yield follow
        for gateway in gateways:
            gateway.stop.set()


@pytest.mark.parametrize(
    ("what", "while_"),
    [("the run directory", "connected"), ("all runs", "the connection is lost"), ("the base path", "connected")],
)
def test_a_run_directory_that_was_removed(
    what: str, while_: str, job: Job, begin: Begin, slurm: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    end = begin(0.5, [], told)
    removed = {"the run directory": job.run, "all runs": job.run.parent, "the base path": job.base}[what]
    if while_ != "connected":
        os.kill(int(job.pid.read_text()), signal.SIGKILL)
    removed.rename(tmp_path / "removed")
    with pytest.raises(RemovedError) as failure:
        end.result(60)
    assert str(failure.value) == (
        f"the run directory of Slurm job 17 was removed while the job was followed: {job.run}\nWithout it, nothing can "
        "receive the messages and the result of the job. It was still running, so it was cancelled, and is over"
    )
    assert failure.value.run == str(job.run)
    assert "--name KEY-1" in (slurm / "cancelled").read_text()
    assert any(text.startswith(f"{job.run} was removed. The step fails unless it is back") for text in told)


def test_a_run_directory_that_was_removed_after_the_end_of_the_job(job: Job, begin: Begin, slurm: Path) -> None:
    end = begin(0.5, [], [])
    job.show("FAILED")
    job.run.rename(job.base / "removed")
    with pytest.raises(RemovedError, match=r"result of the job\. It had ended: FAILED$"):
        end.result(60)
    assert not (slurm / "cancelled").exists()


def test_whoever_only_reads_cancels_nothing(job: Job, begin: Begin, slurm: Path) -> None:
    """`scripts/job logs --follow`."""
    end = begin(0.5, [], [], "")
    job.run.rename(job.base / "removed")
    with pytest.raises(RemovedError, match=r"It is still running\. Cancel it:\n  scancel 17$"):
        end.result(60)
    assert not (slurm / "cancelled").exists()


@pytest.mark.parametrize("what", ["the run directory", "the base path"])
def test_a_run_directory_that_is_put_back(what: str, job: Job, begin: Begin, tmp_path: Path) -> None:
    """Or a link to where it is now: the agent makes nothing in its place meanwhile."""
    told: list[str] = []
    end = begin(600, [], told)
    place = {"the run directory": job.run, "the base path": job.base}[what]
    place.rename(tmp_path / "moved")
    wait_until(lambda: any("was removed" in text for text in told), "that is reported", 60)
    job.wait_for_squeue(2)
    place.symlink_to(tmp_path / "moved")
    finish(job)
    assert (end.result(60), job.text) == (0, "first\nlast\n")


@pytest.mark.parametrize(
    ("mount", "while_"),
    [("its mount point is empty", "connected"), ("its mount point is not there", "the connection is lost")],
)
def test_a_file_system_that_goes_away_and_comes_back(
    mount: str, while_: str, job: Job, begin: Begin, slurm: Path, tmp_path: Path
) -> None:
    """The job ends meanwhile. Nothing is concluded from that before its own record can be read."""
    told: list[str] = []
    end = begin(0.1, [str(path) for path in (tmp_path, *tmp_path.parents)], told)
    job.base.rename(tmp_path / "away")
    if mount == "its mount point is empty":
        job.base.mkdir()
    if while_ != "connected":
        os.kill(int(job.pid.read_text()), signal.SIGKILL)
    job.show("COMPLETED")
    wait_until(lambda: any("its file system is away" in text for text in told), "that is reported", 60)
    if while_ == "connected":
        job.wait_for_squeue(6)  # the last one shows it as over, 5 s after the agent was asked to follow it
    assert not end.done()
    if job.base.exists():  # a new agent makes it
        job.base.rename(tmp_path / "mount point")
    (tmp_path / "away").rename(job.base)
    finish(job)
    assert (end.result(60), job.text) == (0, "first\nlast\n")
    assert not (slurm / "cancelled").exists()


def test_a_run_directory_that_cannot_be_reached(job: Job, begin: Begin, tmp_path: Path) -> None:
    """The step reports what the file system says, and follows the job when that has passed."""
    told: list[str] = []
    end = begin(0.1, [], told)
    job.base.rename(tmp_path / "away")
    job.base.symlink_to(job.base)
    wait_until(lambda: f"{job.run}: Too many levels of symbolic links" in told, "that is reported", 60)
    job.base.unlink()
    (tmp_path / "away").rename(job.base)
    finish(job)
    assert (end.result(60), job.text) == (0, "first\nlast\n")


def test_a_person_terminates_a_run_whose_directory_was_removed(job: Job, prepare: Prepare, slurm: Path) -> None:
    job.run.rename(job.base / "removed")
    texts, left, _ = cancel_jobs(prepare(HURRIED), {str(job.run): "17"}, 30)
    assert (texts, left, (slurm / "cancelled").exists()) == (["Slurm job 17 is over: CANCELLED"], {}, True)


def test_a_person_terminates_an_array_whose_directory_was_removed(
    prepare: Prepare, slurm: Path, tmp_path: Path
) -> None:
    """Its first task is over, and another one is not: nothing says any more that there is one."""
    job = Job(slurm, tmp_path, array=True)
    put(slurm, "scontrol", f"echo '{record('0', 'COMPLETED')}'; echo '{record('1', 'RUNNING')}'")
    job.run.rename(job.base / "removed")
    cancel_jobs(prepare(HURRIED), {str(job.run): "17"}, 30)
    assert "--name KEY-1" in (slurm / "cancelled").read_text()


def test_what_the_step_reports(prepare: Prepare, played_slurm: PlayedSlurm, tmp_path: Path) -> None:
    """Its workload removes the run directory."""
    prepare(HURRIED + AGENT.format(pid=f"{tmp_path}/pid", patience=0.5, above=[]))
    removes = "import os, shutil, time; shutil.rmtree(os.path.dirname(os.getcwd())); time.sleep(600)"
    outcome = materialize(removes, tmp_path)
    (name,) = played_slurm.names()
    assert (
        f"the run directory of Slurm job 17 was removed while the job was followed: {played_slurm.runs}/{name}\n"
        "Without it, nothing can receive the messages and the result of the job. It was still running, so it was "
        "cancelled, and is over\n"
        "Re-execute this run. Do not remove the folder of a run that is not over.\n"
    ) in outcome.error
    assert "still running. Re-execute" not in outcome.error
    assert played_slurm.cancelled() == ["17"]


WAITS = f"""{PIPES}
    import os, time
    print("begun", flush=True)
    while not os.path.exists(pipes.extras["go_on"]):
        time.sleep(0.1)
    pipes.report_asset_materialization(metadata={{"job": os.environ["SLURM_JOB_ID"]}})
"""


def test_a_step_is_executed_again_whose_run_directory_was_removed(played_slurm: PlayedSlurm, tmp_path: Path) -> None:
    """Its job still runs, and would write its messages into the directory of the next one."""
    variables = {**{name: os.environ[name] for name in ("PATH", "HOME")}, **played_slurm.variables}
    step, go_on = Step(tmp_path / "step", variables, WAITS), tmp_path / "go-on"
    step.call({"go_on": str(go_on)})
    killed = step.start(again=False)
    wait_until(lambda: step.output == "begun\n", "the step follows the job", 120)
    kill(killed)
    (name,) = played_slurm.names()
    shutil.rmtree(played_slurm.runs / name)
    success, error, _ = step.result(step.start(again=True))
    assert not success
    assert (
        f"Slurm job 17 of an earlier run of this step is RUNNING, and its run directory is not in {played_slurm.runs}: "
        f"{name}\nA new job would run beside it. Set SLURM_DEPLOYMENT_BASE_PATH as it was then, if you have changed "
        f"it, or cancel the job on {os.uname()[1]}; then re-execute this run:\n  scancel 17"
    ) in error
    assert played_slurm.names() == [name]
    subprocess.run(["scancel", "17"], check=True)
    go_on.touch()
    success, error, metadata = step.result(step.start(again=True))
    assert (success, error, metadata["job"]) == (True, "", "18")


def finish(job: Job) -> None:
    job.write("stdout", "last\n")
    sizes = {"messages.jsonl": 0, "stdout": 11, "stderr": 0}
    job.write("events", json.dumps({"code": 0, "time": 2, "sizes": sizes}) + "\n")
    job.show("COMPLETED")
