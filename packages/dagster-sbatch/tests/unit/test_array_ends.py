"""How the tasks of an array job end: what the agent makes of Slurm's records, of the tasks' own, and of their lack."""

import json
import time
from pathlib import Path

import pytest

from dagster_sbatch.slurm.gateway import Attempt, JobToFollow, follow_jobs
from dagster_sbatch.slurm.gateway.agent import disk, ends, run_directories, shared_queue, slurm_commands, tasks
from slurm_in_a_box import wait_until
from support.agent_fixtures import HURRIED, Prepare, put
from support.array_run import Recorder
from support.array_site import KEY, NO_ACCOUNTING, Follow, Site, lines, record, wait_for_ends
from support.submission import submit_run

INVALID = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
AWAY = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
TIMES = [100, 110, 120]


def row(index: str, state: str, start: str = "110", key: str = KEY) -> str:
    """A line of sacct."""
    return f"{state}|0:0|100|{start}|120|p1|{key}|17_{index}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", {3}),
        ("[2-4,7%2]", {2, 3, 4, 7}),
        ("0-8:4,11", {0, 4, 8, 11}),
        ("4294967294", {4294967294}),
        ("N/A", set()),
    ],
)
def test_indices_as_slurm_writes_them(text: str, expected: set[int]) -> None:
    assert slurm_commands.indices(text) == expected
    assert slurm_commands.indices(slurm_commands.ranges(expected)) == expected


def test_an_array_job_is_one_row_of_the_queue() -> None:
    """Its state is RUNNING as long as a task runs, its reason that of the waiting tasks."""
    rows = [
        ["17_[4-9%2]", "PENDING", "JobArrayTaskLimit", "N/A", KEY, "p1"],
        ["17_1", "COMPLETED", "None", "5", KEY, "p1"],
        ["17_2", "RUNNING", "None", "6", KEY, "p1"],
        ["17_3", "RUNNING", "None", "7", KEY, "p1"],
        ["18", "PENDING", "Priority", "N/A", "other-1", "p1"],
        ["19_[0]", "PENDING", "Priority", "N/A", "third-1", "p1"],
        ["20_0", "FAILED", "None", "8", "fourth-1", "p1"],
    ]
    assert shared_queue.by_job(rows) == {
        "17": ["RUNNING", "JobArrayTaskLimit", "N/A", KEY, "p1", {"PENDING": "4-9", "RUNNING": "2-3"}],
        "18": ["PENDING", "Priority", "N/A", "other-1", "p1", {"PENDING": "0"}],
        "19": ["PENDING", "Priority", "N/A", "third-1", "p1", {"PENDING": "0"}],
        "20": ["FAILED", "None", "8", "fourth-1", "p1", {}],
    }


# Of six tasks 1, 2 and 3 have started.
@pytest.mark.parametrize(
    ("scontrol", "sacct", "expected"),
    [
        (  # all in one answer of the controller; waiting tasks share a record
            lines(record("1", "COMPLETED"), record("2", "RUNNING"), record("3,5", "TIMEOUT"), record("0,4", "PENDING")),
            "exit 1",
            {0: None, 1: "COMPLETED", 2: None, 3: "TIMEOUT", 4: None, 5: "TIMEOUT"},
        ),
        (  # waiting tasks that were cancelled one by one leave no record anywhere
            lines(record("1-3", "RUNNING", "Unknown"), record("0", "PENDING")),
            lines(row("1", "RUNNING"), row("2", "RUNNING"), row("3", "RUNNING"), row("[0%2]", "PENDING", "Unknown")),
            {0: None, 1: None, 2: None, 3: None, 4: "CANCELLED", 5: "CANCELLED"},
        ),
        (  # those that were cancelled all at once leave a record without indices
            lines(record("1-3", "FAILED"), record("4294967294", "CANCELLED")),
            "exit 1",
            {0: "CANCELLED", 1: "FAILED", 2: "FAILED", 3: "FAILED", 4: "CANCELLED", 5: "CANCELLED"},
        ),
        (  # which says nothing of a task that had started
            lines(record("2-3", "FAILED"), record("4294967294", "CANCELLED")),
            lines(row("1", "COMPLETED")),
            {0: "CANCELLED", 1: "COMPLETED", 2: "FAILED", 3: "FAILED", 4: "CANCELLED", 5: "CANCELLED"},
        ),
        (  # the accounting has only another job of the same id
            lines(record("1-3", "RUNNING", "Unknown")),
            lines(row("0", "FAILED", key="x")),
            {0: "CANCELLED", 1: None, 2: None, 3: None, 4: "CANCELLED", 5: "CANCELLED"},
        ),
        (  # the controller forgets each task some minutes after its end
            lines(record("3", "RUNNING", "Unknown"), record("0,4,5", "PENDING")),
            lines(row("1", "COMPLETED"), row("2", "CANCELLED by 0"), row("3", "RUNNING")),
            {0: None, 1: "COMPLETED", 2: "CANCELLED", 3: None, 4: None, 5: None},
        ),
        (  # and a centre may have no accounting
            lines(record("3", "RUNNING", "Unknown"), record("0,4,5", "PENDING")),
            NO_ACCOUNTING,
            {0: None, 1: "", 2: "", 3: None, 4: None, 5: None},
        ),
        (INVALID, NO_ACCOUNTING, dict.fromkeys(range(6), "")),
        (  # it has lost the job, which runs in the accounting until an administrator ends it there
            INVALID,
            lines(row("1", "RUNNING"), row("2", "RUNNING"), row("[0,3-5%2]", "PENDING", "Unknown")),
            {0: "CANCELLED", 1: "", 2: "", 3: "", 4: "CANCELLED", 5: "CANCELLED"},
        ),
        (AWAY, lines(row("[0-5%2]", "CANCELLED by 1", "None")), dict.fromkeys(range(6), "CANCELLED")),
        # The id is another job's by now.
        (lines(record("0-5", "FAILED", key="x")), lines(row("1", "FAILED", key="x")), dict.fromkeys(range(6), "")),
        # An outage is no end.
        (AWAY, AWAY, "Unable to contact"),
        (INVALID, AWAY, "Unable to contact"),
        (AWAY, lines(), "Unable to contact"),
    ],
)  # fmt: skip
def test_what_slurm_says_of_tasks(
    slurm: Path, scontrol: str, sacct: str, expected: dict[int, str | None] | str
) -> None:
    put(slurm, "scontrol", scontrol)
    put(slurm, "sacct", sacct)
    found, trouble = ends.verdicts("17", KEY, 6, set(range(6)), {1, 2, 3})
    if isinstance(expected, str):
        assert not found
        assert expected in str(trouble)
    else:
        assert trouble is None
        assert {index: said and said["state"] for index, said in found.items()} == expected


def test_an_outage_leaves_only_those_tasks_undecided_that_need_it(slurm: Path) -> None:
    put(slurm, "scontrol", lines(record("1", "COMPLETED"), record("2", "RUNNING", "Unknown")))
    put(slurm, "sacct", AWAY)
    found, trouble = ends.verdicts("17", KEY, 4, {1, 2, 3}, {1, 2, 3})
    assert (found[1]["state"], found[1]["times"], found[2]) == ("COMPLETED", TIMES, None)
    assert set(found) == {1, 2}
    assert isinstance(trouble, disk.RequestError)


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([("COMPLETED", 0), ("COMPLETED", 0)], ("COMPLETED", 0)),
        ([("COMPLETED", 0), ("FAILED", 3), ("CANCELLED", None)], ("FAILED", 3)),
        ([("COMPLETED", 0), ("", 0)], ("COMPLETED", 0)),
        ([("COMPLETED", 0), ("", None)], ("", None)),
        ([("COMPLETED", 0), ("", 4)], ("", 4)),
    ],
)
def test_the_end_of_an_array_job_is_that_of_its_worst_task(
    states: list[tuple[str, int | None]], expected: tuple[str, int | None]
) -> None:
    ends = {
        index: {"state": state, "code": code, "exit": "", "times": [100 + index, 110 + index, 120 + index]}
        for index, (state, code) in enumerate(states)
    }
    found = tasks.whole(ends)
    assert (found["state"], found["code"]) == expected
    assert found["times"] == [100, 110, 119 + len(states)]


def test_two_agents_that_record_ends_lose_none(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks.jsonl").write_text("{}\n" * 3)
    agents = [tasks.Tasks(str(tmp_path)) for _ in range(3)]
    for index, agent in enumerate(agents):
        agent.keep({index: {"state": "COMPLETED", "exit": "0:0", "times": TIMES, "code": 0}})
    assert set(tasks.Tasks(str(tmp_path)).ends) == {0, 1, 2}
    assert json.loads((tmp_path / "end").read_text())["state"] == "COMPLETED"


def counts(seen: Recorder) -> tuple[int, int]:
    return seen.states[-1].running, seen.states[-1].requeued


@pytest.fixture
def site(slurm: Path, tmp_path: Path) -> Site:
    return Site(slurm, tmp_path, 3)


def test_a_task_that_was_killed_has_no_exit_code(site: Site, prepare: Prepare, follow: Follow) -> None:
    """Its record may only be late, and appear while Slurm is asked: it is asked twice before an end counts."""
    seen = follow(site, prepare(HURRIED))
    for index in range(3):
        site.start(index)
    now, late = int(time.time()), site.run / "late"
    late.write_text(
        json.dumps({"code": 0, "time": now, "sizes": {"messages.jsonl": 0, "stdout": 5, "stderr": 0}}) + "\n"
    )
    task = site.run / "tasks" / "1"
    appear = f"[ -e '{late}' ] && echo late >>'{task}.stdout' && cat '{late}' >>'{task}/events' && rm '{late}'"
    answer = lines(record("0-1", "COMPLETED", str(now)), record("2", "FAILED", str(now)))
    put(site.slurm, "scontrol", f"{appear}; {answer}")
    site.end(0)
    wait_for_ends(seen, 3)
    assert seen.outcomes == {0: ("COMPLETED", 0), 1: ("COMPLETED", 0), 2: ("FAILED", None)}
    assert seen.text(1) == "late\n"
    kept = json.loads((site.run / "ends.json").read_text())["tasks"]
    assert {index: (end["state"], end.get("code")) for index, end in kept.items()} == {
        "0": ("COMPLETED", 0),
        "1": ("COMPLETED", 0),
        "2": ("FAILED", None),
    }
    assert json.loads((site.run / "end").read_text())["state"] == "FAILED"


def test_a_claim_takes_no_end_for_final_whose_record_may_still_appear(site: Site, prepare: Prepare) -> None:
    """The task has recorded its success on another node, and this one does not see that yet."""
    gateway, now = prepare(), str(int(time.time()))
    submit_run(gateway, str(site.run), site.array.files or {})
    for index in range(2):
        site.start(index)
    never = record("2", "CANCELLED", now).replace("StartTime=110", "StartTime=Unknown")
    site.say(record("0", "COMPLETED", now), record("1", "CANCELLED", now), never)

    def claimed() -> Attempt:
        return gateway.claim(str(site.run.parent), "KEY", "token", "me").attempts[0]

    first = claimed()
    assert (first.over, set(first.ends)) == (False, {1, 2})
    site.end(0)
    second = claimed()
    assert (second.over, second.ends[0].code) == (True, 0)


@pytest.mark.parametrize("code", [None, 0])
def test_a_task_that_runs_again_is_followed_again(
    site: Site, prepare: Prepare, follow: Follow, code: int | None
) -> None:
    """It was cut short, or an administrator has requeued it after its end."""
    seen = follow(site, prepare(HURRIED))
    site.say(record("0-2", "PENDING", "Unknown"))
    site.start(1)
    site.write(1, "stdout", "first\n")
    site.end(1, code)
    wait_until(lambda: seen.text(1) == "first\n", "its output", 60)
    site.wait_until_asked()
    put(site.slurm, "squeue", "echo '17_1|PENDING|BeginTime|N/A|KEY-1|p1'; echo '17_[0,2]|PENDING|None|N/A|KEY-1|p1'")
    wait_until(lambda: counts(seen) == (0, 1), "it waits to run again", 60)
    put(site.slurm, "squeue", "echo '17_1|RUNNING|None|N/A|KEY-1|p1'; echo '17_[0,2]|PENDING|None|N/A|KEY-1|p1'")
    site.start(1, at=time.time())
    wait_until(lambda: counts(seen) == (1, 0), "it runs again", 60)
    site.write(1, "stdout", "second\n")
    site.end(1, 0)
    site.say(record("0,2", "RUNNING", "Unknown"), record("1", "COMPLETED"))
    wait_for_ends(seen, 1)
    assert (seen.outcomes, seen.text(1), len(seen.starts[1])) == ({1: ("COMPLETED", 0)}, "first\nsecond\n", 2)


def test_slurm_that_is_down_ends_no_task(site: Site, prepare: Prepare, follow: Follow) -> None:
    told: list[str] = []
    put(site.slurm, "scontrol", f"echo >>'{site.asked}'; {AWAY}")
    seen = follow(site, prepare(HURRIED, told))
    for index in range(3):
        site.start(index)
        site.end(index)
    site.wait_until_asked()
    site.wait_until_asked()
    assert not seen.ends
    assert any("Unable to contact slurm controller" in text for text in told)
    site.say(record("0-2", "COMPLETED"))
    wait_for_ends(seen, 3)
    assert set(seen.outcomes.values()) == {("COMPLETED", 0)}


def test_slurm_that_forgets_leaves_the_tasks_own_records(site: Site, prepare: Prepare, follow: Follow) -> None:
    """MinJobAge is short, there is no accounting, and one task was cancelled while it waited."""
    seen = follow(site, prepare(HURRIED))
    for index in range(2):
        site.start(index)
        site.end(index, 3 * index)
    put(site.slurm, "scontrol", INVALID)
    wait_for_ends(seen, 3)
    assert seen.outcomes == {0: ("", 0), 1: ("", 3), 2: ("", None)}


NO_SPACE = """
def spoil():
    import errno, sys
    def store(path, *_):
        raise OSError(errno.ENOSPC, "No space left on device", path)
    sys.modules["agent.tasks"].store = store
"""


def test_a_full_disk_keeps_no_end_from_the_client(site: Site, prepare: Prepare, follow: Follow) -> None:
    seen = follow(site, prepare(HURRIED + NO_SPACE))
    for index in range(3):
        site.start(index)
        site.end(index)
    site.say(record("0-2", "COMPLETED"))
    wait_for_ends(seen, 3)
    assert not (site.run / "ends.json").exists()


COUNTING = """
def spoil():
    import sys
    arrays = sys.modules["agent.follower"]
    events_of = arrays.events_of
    def count(folder):
        with open({counted!r}, "a") as file:
            file.write(folder.rpartition("/")[2] + "\\n")
        return events_of(folder)
    arrays.events_of = count
"""


def test_only_running_tasks_are_read_and_not_too_often(
    slurm: Path, tmp_path: Path, prepare: Prepare, follow: Follow
) -> None:
    """Of 300 tasks 50 are over, 200 run and are quiet, 50 wait."""
    site, counted = Site(slurm, tmp_path, 300), tmp_path / "counted"
    seen = follow(site, prepare(HURRIED + COUNTING.format(counted=str(counted))))
    for index in range(250):
        site.start(index)
    for index in range(50):
        site.end(index)
    put(
        slurm,
        "scontrol",
        lines(record("0-49", "COMPLETED"), record("50-249", "RUNNING", "Unknown"), record("250-299", "PENDING")),
    )
    wait_for_ends(seen, 50)
    wait_until(lambda: len(seen.starts) == 250, "all have been read")
    begun = time.monotonic()
    counted.write_text("")
    wait_until(lambda: len(set(counted.read_text().split())) == 200, "each of those that run is read")
    read, seconds = list(map(int, counted.read_text().split())), time.monotonic() - begun
    assert set(read) == set(range(50, 250))
    assert len(read) <= 110 * (seconds + 0.5)
    site.write(77, "stdout", "news\n")
    wait_until(lambda: seen.text(77) == "news\n", "it is read in its turn")


REFUSING = """
def spoil():
    import os, sys, threading, time
    jobs = sys.modules["agent.jobs"]
    submit = jobs.submit_when_possible
    def refuse(*arguments):
        if os.path.exists({lost!r} + ".2"):
            raise sys.modules["agent.disk"].RequestError("refused", "Permission denied")
        return submit(*arguments)
    def lose():
        while not os.path.exists({lost!r}):
            time.sleep(0.01)
        os.rename({lost!r}, {lost!r} + ".2")
        os._exit(0)
    jobs.submit_when_possible = refuse
    threading.Thread(target=lose, daemon=True).start()
"""


def test_a_refusal_over_a_new_connection_costs_no_job(
    site: Site, prepare: Prepare, follow: Follow, tmp_path: Path
) -> None:
    """A step whose array job counts as refused submits its tasks once more. The job may run all the same."""
    lost, troubles = tmp_path / "lost", list[str]()
    seen = follow(site, prepare(HURRIED + REFUSING.format(lost=str(lost)), troubles))
    site.start(0)
    site.write(0, "stdout", "first\n")
    wait_until(lambda: seen.text(0) == "first\n", "its output", 60)
    lost.touch()
    wait_until(lambda: troubles, "the loss", 60)
    for index in range(3):
        site.start(index)
        site.end(index)
    site.say(record("0-2", "COMPLETED"))
    wait_for_ends(seen, 3)
    assert set(seen.outcomes.values()) == {("COMPLETED", 0)}


IN_SMALL_PIECES = """
def spoil():
    for name in ("job_record", "follower"):
        vars(sys.modules["agent." + name]).update(CHUNK=1000, MOST_CHUNKS=1)
    sys.modules["agent.follower"].COMMAND_PATIENCE = 0.5
"""


def test_output_that_takes_long_to_send_is_sent_to_its_end(prepare: Prepare, slurm: Path, tmp_path: Path) -> None:
    """Of a task that is over: gigabytes, over a slow line. Only output that does not come is given up."""
    site = Site(slurm, tmp_path, 1)
    site.run.parent.mkdir(mode=0o700)
    run_directories.lay_out(str(site.run), site.array.files)
    site.start(0)
    site.write(0, "stdout", "x" * 200_000)
    site.end(0, at=5)
    end = {"state": "COMPLETED", "exit": "0:0", "times": TIMES, "code": 0, "time": 5}
    (site.run / "ends.json").write_text(json.dumps({"tasks": {"0": end}}))
    (site.run / "job").symlink_to("17")
    seen = Recorder(JobToFollow(str(site.run), None, [0]))
    follow_jobs(prepare(HURRIED + IN_SMALL_PIECES), seen, "run-1")
    assert (len(seen.written[0, "stdout"]), seen.ends[0].short) == (200_000, {})
