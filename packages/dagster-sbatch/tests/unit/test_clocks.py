"""The clocks of the nodes and of the file server are ahead of the login node's, or behind."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from dagster_sbatch.slurm.gateway import Gateway, JobEnd
from slurm_in_a_box import wait_until
from support.agent_fixtures import HURRIED, Prepare, put
from support.array_site import Follow, Site
from support.submission import submit_run

SKEWS = [-30, 30]
UNSEEN = """
def spoil():
    import sys
    sys.modules["agent.follower"].UNSEEN = 600
"""
QUEUE = "echo '17|{state}|None|N/A|KEY|p1'"
RECORD = "JobName=KEY JobState={state} ExitCode=0:0 SubmitTime=1 StartTime=2 EndTime=3"


class Job:
    """A job that a test plays; its node has another clock."""

    def __init__(self, folder: Path, slurm: Path, skew: int) -> None:
        self.run, self.slurm, self.skew, self.states = folder / "runs" / "KEY", slurm, skew, list[str]()
        self.run.mkdir(parents=True, mode=0o700)
        for name in ("messages.jsonl", "stdout", "stderr", "events"):
            (self.run / name).touch()
        (self.run / "job").symlink_to("17")
        self.say("PENDING")

    def say(self, state: str) -> None:
        """Let Slurm show this state, once: squeue does not answer afterwards."""
        put(self.slurm, "scontrol", f"echo '{RECORD.format(state=state)}'")
        asked = self.run.parent / f"asked-{time.monotonic_ns()}"
        put(self.slurm, "squeue", f"[ ! -e '{asked}' ] || exit 1; touch '{asked}'; {QUEUE.format(state=state)}")

    def write(self, **event: object) -> None:
        with (self.run / "events").open("a") as file:
            file.write(json.dumps({**event, "time": time.time() + self.skew}) + "\n")

    def wait_for(self, *states: str) -> None:
        wait_until(lambda: self.states == [*states], f"states {states}, not {self.states}", 10)


Begin = Callable[[Job, Gateway], Future[JobEnd]]


@pytest.fixture
def begin() -> Iterator[Begin]:
    """`begin(job, gateway)` follows a job in a thread of its own."""
    stops: list[threading.Event] = []
    with ThreadPoolExecutor(1) as pool:

        def follow(job: Job, gateway: Gateway) -> Future[JobEnd]:
            stops.append(gateway.stop)
            report = partial(gateway.run, on_state=lambda state: job.states.append(state.state))
            return pool.submit(report, str(job.run), None, {}, "")

        yield follow
        for stop in stops:
            stop.set()


@pytest.mark.parametrize("skew", SKEWS)
def test_a_job_that_starts_after_the_latest_answer_of_squeue(
    skew: int, prepare: Prepare, slurm: Path, tmp_path: Path, begin: Begin
) -> None:
    """Its end is known at once, and not when squeue answers again."""
    job = Job(tmp_path, slurm, skew)
    end = begin(job, prepare(HURRIED + UNSEEN))
    job.wait_for("PENDING")
    job.write(started="n1", temporary="/tmp")
    job.wait_for("PENDING", "RUNNING")
    put(slurm, "scontrol", f"echo '{RECORD.format(state='COMPLETED')}'")
    job.write(code=0, sizes={})
    assert end.result(10).code == 0


@pytest.mark.parametrize("skew", SKEWS)
def test_a_job_that_waits_to_run_again(skew: int, prepare: Prepare, slurm: Path, tmp_path: Path, begin: Begin) -> None:
    job = Job(tmp_path, slurm, skew)
    begin(job, prepare(HURRIED))
    job.wait_for("PENDING")
    job.write(started="n1", temporary="/tmp")
    job.wait_for("PENDING", "RUNNING")
    job.say("PENDING")
    job.wait_for("PENDING", "RUNNING", "PENDING")


@pytest.mark.parametrize("skew", SKEWS)
def test_tasks_that_start_and_wait_to_run_again(
    skew: int, prepare: Prepare, slurm: Path, tmp_path: Path, follow: Follow
) -> None:
    site, asked, queue = Site(slurm, tmp_path, 1), tmp_path / "queued", "echo '17_0|PENDING|None|N/A|KEY-1|p1'"

    def wait_for(running: int, requeued: int) -> None:
        def counts() -> list[tuple[int, int]]:
            return [(state.running, state.requeued) for state in seen.states]

        wait_until(lambda: counts()[-1:] == [(running, requeued)], f"{running, requeued}, not {counts()}", 10)

    put(slurm, "squeue", f"[ ! -e '{asked}' ] || exit 1; touch '{asked}'; {queue}")
    seen = follow(site, prepare(HURRIED + UNSEEN))
    wait_until(asked.exists, "squeue is asked", 60)
    wait_for(0, 0)
    site.start(0, time.time() + skew)
    wait_for(1, 0)
    put(slurm, "squeue", queue)
    wait_for(0, 1)


LATE = """
def spoil():
    import os, sys, time
    vars(sys.modules["agent.jobs"]).update(LATE=3, SEARCH_EVERY=0.1)
    utime = os.utime
    os.utime = lambda path: utime(path, (time.time() + {skew},) * 2)
"""


@pytest.mark.parametrize("skew", SKEWS)
def test_the_job_of_a_submission_without_an_answer_appears_late(
    skew: int, prepare: Prepare, slurm: Path, tmp_path: Path
) -> None:
    """The file server has another clock. No second job is submitted."""
    run, asked = tmp_path / "runs" / "KEY", tmp_path / "asked"
    run.mkdir(parents=True, mode=0o700)
    (run / "job.sh").touch()
    (run / "tried").touch()
    os.utime(run / "tried", (time.time() + skew,) * 2)
    put(slurm, "sbatch", "echo 18")
    put(slurm, "squeue", f"[ ! -e '{asked}' ] || echo '17|KEY'; touch '{asked}'")
    found = submit_run(prepare(LATE.format(skew=skew)), str(run), None)
    assert (found.job, found.how) == ("17", "found")
