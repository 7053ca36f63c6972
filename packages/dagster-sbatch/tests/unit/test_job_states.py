"""The state of a job as Slurm's queue and the job's own record have it."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from dagster_sbatch.slurm.gateway import Gateway, JobState, StoppedError
from dagster_sbatch.slurm.gateway.agent import ends
from slurm_in_a_box import wait_until
from support.agent_fixtures import HURRIED, Prepare, put
from support.array_site import NO_ACCOUNTING, Follow, Site, record, wait_for_ends

STARTED = {"started": "n1", "temporary": "/tmp"}
WAITS = ("PENDING", "BeginTime", "")


@pytest.mark.parametrize("shown", ["PENDING", "SPECIAL_EXIT"])  # the latter by RequeueExitHold of a site, or a person
@pytest.mark.parametrize(
    "own",
    [
        [],
        [{**STARTED, "time": 100}],  # its node has failed
        [{**STARTED, "time": 100}, {"code": None, "time": 200, "sizes": {}}],  # it was preempted
        [{**STARTED, "time": 100}, {"code": 0, "time": 200, "sizes": {}}],  # an administrator has requeued it
    ],
)
def test_a_job_that_waits_to_run_again_is_shown_as_waiting(
    own: list[dict[str, object]], shown: str, prepare: Prepare, slurm: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "KEY"
    run.mkdir(parents=True, mode=0o700)
    (run / "job").symlink_to("17")
    (run / "events").write_text("".join(f"{json.dumps(event)}\n" for event in own))
    put(slurm, "squeue", f"echo '17|{shown}|BeginTime|N/A|KEY|p1'")
    put(slurm, "scontrol", f"echo 'JobName=KEY JobState={shown} ExitCode=0:0 SubmitTime=1 StartTime=2 EndTime=3'")
    gateway = prepare(HURRIED)
    known = gateway.state(str(run))[0]
    assert known is not None
    assert (known.state, known.reason) == WAITS[:2]

    states: list[JobState] = []

    def report(state: JobState) -> None:
        states.append(state)
        gateway.stop.set()

    with suppress(StoppedError):
        gateway.run(str(run), None, {}, "", on_state=report)
    assert [(state.state, state.reason, state.node) for state in states] == [WAITS]


def test_a_job_that_has_started_since_the_last_look_at_the_queue_is_shown_as_running(
    prepare: Prepare, slurm: Path, tmp_path: Path
) -> None:
    """The view of the queue is a few seconds old, and good for all else."""
    run = tmp_path / "runs" / "KEY"
    run.mkdir(parents=True, mode=0o700)
    (run / "job").symlink_to("17")
    put(slurm, "squeue", "echo '17|PENDING|Priority|N/A|KEY|p1'")
    put(slurm, "scontrol", "echo 'JobName=KEY JobState=RUNNING ExitCode=0:0 SubmitTime=1 StartTime=2 EndTime=3'")
    gateway = prepare()
    assert gateway.queue(str(run.parent))["jobs"].keys() == {"17"}
    put(slurm, "squeue", "echo '17|RUNNING|None|N/A|KEY|p1'")
    (run / "events").write_text(f"{json.dumps({**STARTED, 'time': 100})}\n")
    known = gateway.state(str(run))[0]
    assert known is not None
    assert known.state == "RUNNING"


def follow_until_stopped(gateway: Gateway, run: Path, on_state: Callable[[JobState], None]) -> None:
    """Follow a job until `on_state` sets the gateway's `stop`, for at most 20 s."""
    limit = threading.Timer(20, gateway.stop.set)
    limit.start()
    with suppress(StoppedError):
        gateway.run(str(run), None, {}, "", on_state=on_state)
    limit.cancel()


def test_a_job_that_starts_while_it_is_followed_is_shown_as_running(
    prepare: Prepare, slurm: Path, tmp_path: Path
) -> None:
    """Another run has asked for the view of the queue before; squeue is not asked again for a while."""
    run = tmp_path / "runs" / "KEY"
    run.mkdir(parents=True, mode=0o700)
    (run / "job").symlink_to("17")
    put(slurm, "squeue", "echo '17|PENDING|Priority|N/A|KEY|p1'")
    gateway, states = prepare(), list[tuple[str, str]]()
    gateway.queue(str(run.parent))
    put(slurm, "squeue", "exit 1")

    def report(state: JobState) -> None:
        states.append((state.state, state.node))
        (run / "events").write_text(f"{json.dumps({**STARTED, 'time': 100})}\n")
        if state.state == "RUNNING":
            gateway.stop.set()

    follow_until_stopped(gateway, run, report)
    assert states == [("PENDING", ""), ("RUNNING", "n1")]


def test_a_job_that_slurm_does_not_let_end_is_shown_as_such(prepare: Prepare, slurm: Path, tmp_path: Path) -> None:
    """Its script is over. An epilog takes long, or a process that hangs in the kernel cannot be killed."""
    run = tmp_path / "runs" / "KEY"
    run.mkdir(parents=True, mode=0o700)
    (run / "job").symlink_to("17")
    own = [{**STARTED, "time": 100}, {"code": 0, "time": 200, "sizes": {}}]
    (run / "events").write_text("".join(f"{json.dumps(event)}\n" for event in own))
    put(slurm, "squeue", "echo '17|COMPLETING|None|N/A|KEY|p1'")
    put(slurm, "scontrol", "echo 'JobName=KEY JobState=COMPLETING ExitCode=0:0 SubmitTime=1 StartTime=2 EndTime=3'")
    gateway, states = prepare(HURRIED), list[tuple[str, str]]()

    def report(state: JobState) -> None:
        states.append((state.state, state.node))
        gateway.stop.set()

    follow_until_stopped(gateway, run, report)
    assert states == [("COMPLETING", "n1")]


def test_a_task_whose_gpus_are_idle_is_followed_to_its_end(
    prepare: Prepare, slurm: Path, tmp_path: Path, follow: Follow
) -> None:
    """Its sampler says so in the task's own record."""
    site, troubles = Site(slurm, tmp_path, 1), list[str]()
    seen = follow(site, prepare(HURRIED, troubles))
    site.start(0)
    site.write(0, "events", '{"idle": 600, "time": 2}\n')
    site.write(0, "stdout", "works\n")
    wait_until(lambda: seen.text(0) == "works\n", "its output", 20)
    site.end(0)
    site.say(record("0", "COMPLETED"))
    wait_for_ends(seen, 1)
    assert (seen.outcomes, troubles) == ({0: ("COMPLETED", 0)}, [])


@pytest.mark.parametrize("answer", ["", "printf 'JobId=17 JobName=KE'"])
def test_an_answer_of_slurm_that_is_empty_or_ends_within_a_line_says_nothing(answer: str, slurm: Path) -> None:
    """Slurm says with an error that it does not know a job."""
    put(slurm, "scontrol", answer)
    put(slurm, "sacct", NO_ACCOUNTING)
    found, trouble = ends.verdicts("17", "KEY", 1, ends.SINGLE, ends.SINGLE)
    assert (found, trouble.kind) == ({}, "temporary")


def test_errors_of_two_commands_are_reported_once_each(
    prepare: Prepare, slurm: Path, tmp_path: Path, follow: Follow
) -> None:
    """A task has ended, and the controller does not answer: the follower asks it as long as that lasts."""
    site, troubles = Site(slurm, tmp_path, 1), list[str]()
    put(slurm, "squeue", "echo 'squeue: no answer' >&2; exit 1")
    seen = follow(site, prepare(HURRIED, troubles))
    site.start(0)
    put(slurm, "scontrol", f"echo >>'{site.asked}'; echo 'scontrol: no answer' >&2; exit 1")
    site.end(0)
    wait_until(lambda: site.asked.exists() and site.asked.stat().st_size > 9, "scontrol is asked again and again", 30)
    site.say(record("0", "COMPLETED"))
    wait_for_ends(seen, 1)
    assert sorted(troubles) == [
        "squeue: squeue: no answer",
        "waiting for Slurm to confirm the end: scontrol: scontrol: no answer",
    ]


@pytest.mark.parametrize(
    ("state", "start", "started", "final"),
    [
        ("CANCELLED", None, False, True),
        ("CANCELLED", None, True, False),
        ("CANCELLED", 1, False, False),
        ("", None, False, False),
    ],
)
def test_an_end_is_final_at_once_if_slurm_says_that_the_job_never_started(
    state: str, start: int | None, started: bool, final: bool, tmp_path: Path
) -> None:
    end = {"state": state, "times": [1, start, time.time()]}
    assert ends.is_final(end, started, str(tmp_path)) is final
