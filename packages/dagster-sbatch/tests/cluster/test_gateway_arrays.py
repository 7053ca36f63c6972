"""Array jobs on the real Slurm, over the real SSH: submitted once, followed to each task's end, cancelled whole."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from dagster_sbatch.auth import ensure_certificate
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm.gateway import Gateway, JobToFollow, StoppedError, choose_channel, follow_jobs
from resources import PROJECT
from slurm_in_a_box import CERTIFICATE_USER, SimulatedSite, wait_until
from support.array_run import RUNS, Recorder, files_of, new_key

pytestmark = pytest.mark.cluster
SITE = PROJECT.load_site("musica")
LINES = 'for ((i = 0; i < 2000; i++)); do echo "task $index line $i äöü"; done'
WAIT = "until [ -e ../../go ]; do sleep 0.1; done"
"""For a file in the run directory."""
MESSAGE = """echo '{"message": 1}' >>messages.jsonl"""
MESSAGES = '\n{"method": "job_started"}\n{"message": 1}\n'


@pytest.fixture
def settings(site: SimulatedSite, client_home: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("HOME", str(client_home))
    return Settings.model_validate(site.environment())


@pytest.fixture
def open_gateway(settings: Settings) -> Iterator[Callable[[], Gateway]]:
    made: list[Gateway] = []

    def make() -> Gateway:
        made.append(Gateway(choose_channel(settings, ["python3"], ensure_certificate), threading.Event()))
        return made[-1]

    yield make
    for gateway in made:
        gateway.close()


def array(body: str, tasks: int, key: str = "", **more: Any) -> JobToFollow:
    key = key or new_key()
    return JobToFollow(f"{RUNS}/{key}", files_of(SITE, key, body, tasks, **more), range(tasks))


def job_ids(site: SimulatedSite, run: JobToFollow) -> set[str]:
    """The ids of all array jobs that ever had the run's name."""
    return set(site.squeue("--noheader", "--states=all", f"--name={run.run.rpartition('/')[2]}", "--format=%F").split())


def on_disk(site: SimulatedSite, run: JobToFollow) -> Path:
    return site.layout.home / Path(run.run).relative_to("/home")


def kill_agents(site: SimulatedSite) -> None:
    for each in site.processes_on_login():
        if "zlib" in each.command:
            site.run_on_node(each.machine, f"kill -KILL {each.pid}", check=False)


def lines_of(task: int) -> str:
    return "".join(f"task {task} line {i} äöü\n" for i in range(2000))


@pytest.mark.smoke
def test_each_task_from_submission_to_its_end(open_gateway: Callable[[], Gateway], site: SimulatedSite) -> None:
    gateway, run = open_gateway(), array(f"{LINES}; {MESSAGE}; echo error >&2; exit $((index % 2))", 6, max_running=3)
    seen = Recorder(run)
    follow_jobs(gateway, seen, "run-1")
    assert seen.jobs[run.run].how == "submitted"
    assert seen.outcomes == {task: ("FAILED", 1) if task % 2 else ("COMPLETED", 0) for task in range(6)}
    for task in range(6):
        assert (seen.text(task), seen.text(task, "stderr")) == (lines_of(task), "error\n")
        assert seen.text(task, "messages.jsonl") == MESSAGES
        assert len(seen.starts[task]) == 1
        end = seen.ends[task]
        assert end.submitted and end.started and end.ended
        assert (end.short, end.account) == ({}, "p71234")
    assert max(state.running for state in seen.states) <= 3
    assert job_ids(site, run) == {seen.jobs[run.run].job}
    known = gateway.attempt(run.run)
    assert (known.over, len(known.ends), known.tasks[5], known.followers) == (True, 6, "i5", ["run-1"])
    _, whole = gateway.state(run.run)
    assert whole is not None
    assert (whole.state, whole.code) == ("FAILED", 1)
    gateway.close()
    wait_until(lambda: not site.processes_on_login(), "no process on the login nodes")


def test_nothing_is_lost_or_doubled_when_connections_break(
    open_gateway: Callable[[], Gateway], site: SimulatedSite
) -> None:
    """Also while the job is being submitted, for sbatch is slow; every other time the agent is killed instead."""
    gateway, run = open_gateway(), array(f"{LINES}; sleep 1; {LINES}; {MESSAGE}", 12, max_running=4)
    drops = iter(range(2, 400, 25))
    due, events, disturb = next(drops), 0, cycle((site.faults.drop_connections, lambda: kill_agents(site)))

    def drop(event: str) -> None:
        nonlocal due, events
        events += 1
        if events >= due or (event == "ended" and len(seen.ends) == 1):
            due = next(drops, 1 << 30)
            next(disturb)()

    seen = Recorder(run, on_event=drop)
    with site.faults.sbatch("slow"):
        timer = threading.Timer(1.0, site.faults.drop_connections)
        timer.start()
        follow_jobs(gateway, seen, "run-1")
        timer.join()
    assert due > 50, "connections were dropped"
    assert seen.outcomes == dict.fromkeys(range(12), ("COMPLETED", 0))
    for task in range(12):
        assert seen.text(task) == 2 * lines_of(task)
        assert seen.text(task, "messages.jsonl") == MESSAGES
        assert len(seen.starts[task]) == 1
    assert len(job_ids(site, run)) == 1
    # That of the last ones may be late: sacct is asked for 5 % of the time for which the job ran.
    assert set(seen.rows) >= set(range(4)), "the accounting of tasks that ended before a connection broke"


def test_an_answer_of_sbatch_that_is_lost_submits_one_array_job(
    open_gateway: Callable[[], Gateway], site: SimulatedSite
) -> None:
    gateway, run = open_gateway(), array("echo once", 3)
    seen = Recorder(run)
    with site.faults.sbatch("error-after"):
        follow_jobs(gateway, seen, "run-1")
    assert len(job_ids(site, run)) == 1
    assert [seen.text(task) for task in range(3)] == ["once\n"] * 3


def test_an_array_job_that_waits_is_adopted_and_cancelled_as_a_whole(
    open_gateway: Callable[[], Gateway], site: SimulatedSite
) -> None:
    """Two tasks run, one has ended, the others wait; the client dies, another one takes over, then cancels.

    Meanwhile its user has renamed it.
    """
    run = array('[ "$index" = 0 ] || sleep 300', 50, max_running=2)
    key = run.run.rpartition("/")[2]
    first = open_gateway()
    first.claim(RUNS, key.rpartition("-")[0], "token-1", "me")
    seen = Recorder(run, on_event=lambda event: first.stop.set() if event == "ended" else None)
    with pytest.raises(StoppedError):
        follow_jobs(first, seen, "run-1")
    first.close()
    assert seen.outcomes == {0: ("COMPLETED", 0)}
    second = open_gateway()
    family = key.rpartition("-")[0]
    wait_until(lambda: second.claim(RUNS, family, "token-2", "me").held_by is None, "the first agent leaves")
    (known,) = second.claim(RUNS, family, "token-2", "me").attempts
    assert (known.job, known.over, set(known.ends)) == (seen.jobs[run.run].job, False, {0})
    adopted = Recorder(
        JobToFollow(run.run, None, range(1, 50)),
        on_event=lambda event: second.stop.set() if event == "started" else None,
    )
    with pytest.raises(StoppedError):
        follow_jobs(second, adopted, "run-2")
    assert adopted.jobs[run.run].how == "recorded"
    second.stop = threading.Event()
    site.run_on_login(CERTIFICATE_USER, f"scontrol update JobId={known.job} JobName=mine", check=False)  # one has ended
    assert {*site.squeue("--noheader", "--format=%j").split()} == {"mine"}
    end = second.cancel(run.run)
    assert end is not None
    assert end.state == "CANCELLED"
    last = Recorder(JobToFollow(run.run, None, range(1, 50)))
    follow_jobs(second, last, "run-2")
    assert Counter(last.outcomes.values()) == {("CANCELLED", None): 49}
    known = second.attempt(run.run)
    assert (known.over, len(known.ends), known.ends[0].state) == (True, 50, "COMPLETED")
    assert known.followers == ["run-1", "run-2"]
    assert (on_disk(site, run) / "end").exists()
    assert site.squeue("--noheader", f"--user={CERTIFICATE_USER.name}") == ""


def test_tasks_end_in_every_way_that_slurm_knows(open_gateway: Callable[[], Gateway], site: SimulatedSite) -> None:
    """One is cancelled while it waits, one while it runs, one is requeued; the others end well."""
    gateway = open_gateway()
    again = "[ -e again ] && exit 0; touch again; sleep 300"
    body = f"case $index in 0) sleep 300;; 2) {again};; *) {WAIT};; esac"
    run = array(body, 6, max_running=4)
    begun = threading.Event()
    seen = Recorder(run, on_event=lambda _: begun.set() if {0, 2} <= set(seen.starts) else None)
    thread = threading.Thread(target=lambda: follow_jobs(gateway, seen, "run-1"))
    thread.start()
    assert begun.wait(60)
    job = seen.jobs[run.run].job
    site.run_on_login(CERTIFICATE_USER, f"scancel {job}_5; scancel {job}_0")
    (on_disk(site, run) / "go").touch()
    wait_until((on_disk(site, run) / "tasks/2/again").exists, "it has begun")
    site.cluster.query("scontrol", "requeue", f"{job}_2")
    thread.join(150)
    assert not thread.is_alive()
    states = {task: end.state for task, end in sorted(seen.ends.items())}
    assert states[0] == states[5] == "CANCELLED"
    assert (seen.ends[5].code, seen.starts[5]) == (None, [])
    assert [states[task] for task in (1, 2, 3, 4)] == ["COMPLETED"] * 4
    assert len(seen.starts[2]) == 2
    assert seen.text(2, "messages.jsonl").count("job_started") == 2


def test_an_array_that_slurm_refuses_ends_no_other(open_gateway: Callable[[], Gateway], site: SimulatedSite) -> None:
    """And one that was cancelled before it was submitted."""
    gateway = open_gateway()
    good, refused, cancelled = array("true", 2), array("true", 2, constraint="nosuch"), array("true", 2)
    assert gateway.cancel(cancelled.run) is None
    seen = Recorder(good, refused, cancelled, at_once=3)
    follow_jobs(gateway, seen, "run-1")
    assert "Invalid feature specification" in seen.refusals[refused.run]
    assert "was cancelled before it was submitted" in seen.refusals[cancelled.run]
    assert seen.outcomes == dict.fromkeys(range(2), ("COMPLETED", 0))
    assert job_ids(site, refused) == set()


def test_an_array_waits_for_room_while_another_runs(open_gateway: Callable[[], Gateway], site: SimulatedSite) -> None:
    """Each array alone is within the limit of submitted jobs, both are not; one connection, one agent."""
    gateway = open_gateway()
    limit = ["sacctmgr", "-i", "modify", "qos", "zen4_0768", "set"]
    site.cluster.query(*limit, "MaxSubmitJobsPerUser=5")
    try:
        limits = gateway.limits("zen4_0768", "zen4_0768", "p71234")
        assert (limits.array, limits.submit) == (10001, 5)
        first = array(WAIT, 4)
        go = on_disk(site, first) / "go"
        seen = Recorder(
            first, array("true", 3), at_once=2, on_event=lambda event: go.touch() if event == "waiting" else None
        )
        follow_jobs(gateway, seen, "run-1")
    finally:
        site.cluster.query(*limit, "MaxSubmitJobsPerUser=-1")
    assert len(seen.jobs) == 2
    assert len(seen.waits) == 1
    assert "QOSMaxSubmitJobPerUserLimit" in seen.waits[0]
    assert not seen.refusals
