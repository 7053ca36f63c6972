"""Requests about array jobs: Slurm's limits, what is known of a run, rejected results; also while a job is followed."""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dagster_sbatch.run.adoption import choose
from dagster_sbatch.slurm import Retries
from dagster_sbatch.slurm.gateway import Gateway, JobToFollow, Limits, RefusedError, StoppedError, follow_jobs
from dagster_sbatch.slurm.gateway.agent import ends, run_directories
from resources import PROJECT
from slurm_in_a_box import wait_until
from support.agent_fixtures import HURRIED, Prepare, put
from support.array_run import Recorder, files_of
from support.array_site import Site, record
from support.submission import submit_run

SCONTROL = """\
case "$*" in
"show config") printf 'MaxArraySize            = {size}\\nMaxJobCount             = {count}\\n'
  printf 'SchedulerParameters     = {parameters}\\n';;
*partition*) echo 'PartitionName=cpu AllowQos=ALL QoS={qos} DefaultTime=1';;
esac"""
SACCTMGR = """\
case "$*" in
*"assoc user= "*) echo '|{project}';;
*assoc*) printf 'cpu|{association}|\\ngpu|1|1\\n';;
*"qos mine"*) echo 'mine|{mine}||';;
*"qos of_partition"*) echo 'of_partition||40|60';;
esac"""
NAMED = ("project", "association", "mine")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, Limits(1001, None)),
        ({"parameters": "bf_interval=3,max_array_tasks=500"}, Limits(500, None)),
        ({"association": "30"}, Limits(1001, 30)),
        ({"association": "30", "mine": "20"}, Limits(1001, 20)),
        ({"association": "30", "project": "25"}, Limits(1001, 25)),
        ({"association": "50", "qos": "of_partition"}, Limits(1001, 40)),
        ({"count": "10000"}, Limits(1001, 10000)),
        ({"count": "10000", "association": "30"}, Limits(1001, 30)),
        ({"size": ""}, Limits(None, None)),
    ],
)
def test_the_limits_are_the_fewest_that_apply(
    said: dict[str, str], expected: Limits, slurm: Path, prepare: Prepare
) -> None:
    """Of all users, the project, the user in it (not in other partitions), the job's QoS, and that of the partition."""
    known = {"size": "1001", "count": "", "parameters": "(null)", "qos": "N/A", **dict.fromkeys(NAMED, ""), **said}
    put(slurm, "scontrol", SCONTROL.format(**known))
    put(slurm, "sacctmgr", SACCTMGR.format(**known))
    assert prepare().limits("cpu", "mine", "p1") == expected


@pytest.mark.parametrize(("named", "exported", "expected"), [("p9", "p3", 9), ("", "p3", 3), ("", "", 9)])
def test_the_limits_are_those_of_the_project_that_is_charged(
    named: str, exported: str, expected: int, slurm: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that the job script names, else SBATCH_ACCOUNT, else the user's default, whatever others allow."""
    monkeypatch.setenv("SBATCH_ACCOUNT", exported)
    put(slurm, "scontrol", SCONTROL.format(size="1001", count="", parameters="", qos="N/A"))
    put(
        slurm,
        "sacctmgr",
        """\
case "$*" in
*"show user"*) printf 'p9|p2|\\np9|p3|\\np9|p9|\\n';;
*account=p*) account="${*##*account=p}"; echo "|${account%% *}|";;
*assoc*) printf '|2|\\n|3|\\n|9|\\n';;
esac""",
    )
    assert prepare().limits("cpu", "", named).submit == expected


def test_the_limits_of_projects_that_may_not_be_the_users_do_not_count(slurm: Path, prepare: Prepare) -> None:
    """The accounting names no default project of the user."""
    put(slurm, "scontrol", SCONTROL.format(size="1001", count="", parameters="", qos="N/A"))
    put(slurm, "sacctmgr", 'case "$*" in *"show user"*) ;; *"user= "*) echo "|1";; *) echo "|30|";; esac')
    assert prepare().limits("cpu", "", "") == Limits(1001, 30)


def test_a_centre_without_accounting_names_no_limit_of_submitted_jobs(slurm: Path, prepare: Prepare) -> None:
    put(slurm, "scontrol", SCONTROL.format(size="1001", count="", parameters="", qos="N/A"))
    put(slurm, "sacctmgr", "echo 'You are not running a supported accounting_storage plugin' >&2; exit 1")
    assert prepare().limits("cpu", "mine", "p1") == Limits(1001, None)


SLEEPS = """\
if [ -e '{mark}' ]; then echo 17; exit; fi
touch '{mark}'
echo '{says}' >&2
exec sleep 5"""
WAITS = "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying"
IMPATIENT = """
def spoil():
    import sys
    vars(sys.modules["agent.jobs"]).update(LATE=0, SEARCH_EVERY=0.2, SBATCH_PATIENCE=2)
"""


@pytest.mark.parametrize(("says", "more"), [(WAITS, f". {WAITS}"), ("", "")], ids=["something", "nothing"])
def test_what_sbatch_says_while_it_waits_for_room_is_reported(
    slurm: Path, prepare: Prepare, tmp_path: Path, says: str, more: str
) -> None:
    """Slurm has as many jobs as it can have (MaxJobCount). sbatch is not overtaken: the next one comes after it."""
    put(slurm, "sbatch", SLEEPS.format(mark=tmp_path / "asked", says=says))
    told: list[str] = []
    (tmp_path / "base").mkdir(mode=0o700)
    found = submit_run(prepare(HURRIED + IMPATIENT, told), f"{tmp_path}/base/runs/KEY", {"job.sh": ""})
    assert (found.job, found.how) == ("17", "submitted")
    assert [text for text in told if text.startswith("sbatch")] == [f"sbatch did not answer within 2 s{more}"]


def test_an_sbatch_that_refuses_and_says_nothing(slurm: Path, prepare: Prepare, tmp_path: Path) -> None:
    put(slurm, "sbatch", "exit 3")
    (tmp_path / "base").mkdir(mode=0o700)
    with pytest.raises(RefusedError, match=r"^sbatch ended with exit code 3, and gave no reason$"):
        submit_run(prepare(HURRIED), f"{tmp_path}/base/runs/KEY", {"job.sh": ""})


def test_a_rejected_result_is_known_to_the_next_claim(prepare: Prepare, tmp_path: Path) -> None:
    run, gateway = tmp_path / "runs" / "family-1", prepare()
    run.parent.mkdir(mode=0o700)
    run_directories.lay_out(str(run), files_of(PROJECT.load_site("musica"), "family-1", "true", 3))
    ends = {str(index): {"state": "COMPLETED", "exit": "0:0", "times": [1, 2, 3], "code": 0} for index in range(2)}
    ends["2"] = {"state": "NODE_FAIL", "exit": "0:0", "times": [1, 2, 3]}  # before the task could say that it started
    (run / "job").symlink_to("17")
    (run / "ends.json").write_text(json.dumps({"tasks": ends}))
    for index in (0, 1):
        (run / "tasks" / f"{index}.started").touch()
    gateway.claim(str(run.parent), "family", "token", "me")
    for index in (1, 2):
        gateway.reject(str(run), index)
    wait_until((run / "tasks/2/failed").exists, "the mark", 60)
    (known,) = gateway.claim(str(run.parent), "family", "token", "me").attempts
    assert (known.number, known.job, known.over, known.tasks) == (1, "17", True, ["i0", "i1", "i2"])
    assert (known.rejected, known.started) == (frozenset({1, 2}), frozenset({0, 1}))
    assert {index: end.code for index, end in known.ends.items()} == {0: 0, 1: 0, 2: None}


def test_a_task_that_was_cut_short_waits_to_run_again(prepare: Prepare, slurm: Path, tmp_path: Path) -> None:
    """It has not failed: Slurm puts preempted tasks back into the queue."""
    run, gateway = tmp_path / "runs" / "KEY-1", prepare()
    run.parent.mkdir(mode=0o700)
    run_directories.lay_out(str(run), files_of(PROJECT.load_site("musica"), "KEY-1", "true", 3))
    (run / "job").symlink_to("17")
    for index, end in enumerate(('{"code": null, "time": 2}\n', "")):
        (run / "tasks" / f"{index}.started").touch()
        (run / "tasks" / str(index) / "events").write_text(f'{{"started": "n1", "time": 1}}\n{end}')
    waits = "JobId=17 ArrayTaskId=0-2 JobName=KEY-1 JobState=PENDING ExitCode=0:0 SubmitTime=1 StartTime=2 EndTime=3"
    put(slurm, "scontrol", f"echo '{waits}'")
    known = gateway.attempt(str(run))
    assert (known.started, known.requeued, known.ends) == (frozenset({0, 1}), frozenset({0}), {})
    counts = gateway.ask(do="run_directories.task_counts", paths=[str(run)])["counts"][str(run)]
    assert counts == {"done": 0, "running": 1, "waiting": 2, "failed": 0}


@pytest.mark.parametrize("left", ["", "{}"])
def test_no_task_is_submitted_beside_an_array_job_whose_record_is_gone(
    left: str, prepare: Prepare, slurm: Path, tmp_path: Path
) -> None:
    """The site has removed old files. It is not known which tasks the job has: all that are not over are cancelled."""
    run = tmp_path / "runs" / "KEY-1"
    run.parent.mkdir(mode=0o700)
    run_directories.lay_out(str(run), files_of(PROJECT.load_site("musica"), "KEY-1", "true", 3))
    (run / "job").symlink_to("17")
    (run / "submitted_with.json").write_text(left)
    put(slurm, "scontrol", f"echo '{record('0', 'COMPLETED')}'; echo '{record('1-2', 'PENDING', 'Unknown')}'")
    attempt = prepare().attempt(str(run))
    choice = choose([attempt], {0: "i0", 1: "i1", 2: "i2"}, lambda *_: False, Retries())
    assert (choice.follow, list(choice.new), choice.outdated) == ({}, [0, 1, 2], {str(run): [1, 2]})


def test_an_array_job_is_one_whatever_becomes_of_the_list_of_its_tasks(
    prepare: Prepare, slurm: Path, tmp_path: Path
) -> None:
    """The site has removed it, as the oldest file. The workload of a single job has made one of that name."""
    array, single, gateway = tmp_path / "runs" / "KEY-1", tmp_path / "runs" / "KEY-2", prepare()
    array.parent.mkdir(mode=0o700)
    files = files_of(PROJECT.load_site("musica"), "KEY-1", "true", 3)
    run_directories.lay_out(str(array), files)
    del files["tasks.jsonl"]
    run_directories.lay_out(str(single), files)
    for run, change in ((array, Path.unlink), (single, Path.touch)):
        (run / "job").symlink_to("17")
        change(run / "tasks.jsonl")
    put(slurm, "scontrol", f"echo '{record('0', 'COMPLETED')}'; echo '{record('1-2', 'PENDING', 'Unknown')}'")
    known = gateway.attempt(str(array))
    assert (set(known.ends), len(known.tasks), known.over) == ({0}, 3, False)
    runs = "JobId=17 JobName=KEY-2 JobState=RUNNING ExitCode=0:0 SubmitTime=1 StartTime=2 EndTime=3"
    put(slurm, "scontrol", f"echo '{runs}'")
    known = gateway.attempt(str(single))
    assert (list(known.tasks), known.over) == ([""], False)
    paths = [str(array), str(single)]
    assert gateway.ask(do="run_directories.task_counts", paths=paths)["counts"].keys() == {str(array)}


def test_some_tasks_are_cancelled_by_one_command(prepare: Prepare, slurm: Path, tmp_path: Path) -> None:
    run, record = tmp_path / "runs" / "KEY-1", "JobId=17 ArrayTaskId={} JobName=KEY-1 JobState={} ExitCode=0:0"
    run.parent.mkdir(mode=0o700)
    run_directories.lay_out(str(run), files_of(PROJECT.load_site("musica"), "KEY-1", "true", 6))
    (run / "job").symlink_to("17")
    times = "SubmitTime=1 StartTime=Unknown EndTime=3"
    waits, cancelled = (f"{record.format('0-5', state)} {times}" for state in ("PENDING", "CANCELLED"))
    put(slurm, "scontrol", f"[ -e '{tmp_path}/scancel' ] && echo '{cancelled}' || echo '{waits}'")
    put(slurm, "scancel", f'echo "$@" >>"{tmp_path}/scancel"')
    ends = prepare().cancel_tasks(str(run), [4, 1, 2])
    assert {index: end.state for index, end in ends.items()} == dict.fromkeys((1, 2, 4), "CANCELLED")
    assert (tmp_path / "scancel").read_text().split()[-3:] == ["--name", "KEY-1", "17_[1-2,4]"]


def test_rejecting_a_result_reads_no_list_of_tasks(tmp_path: Path) -> None:
    """The agent rejects in the thread that reads requests, and there may be 10,000 tasks."""
    (tmp_path / "KEY-1/tasks/7").mkdir(parents=True)
    (tmp_path / "KEY-1/tasks.jsonl").mkdir()  # an error for who reads it
    run_directories.reject(None, {"run": str(tmp_path / "KEY-1"), "task": 7}, None)
    assert (tmp_path / "KEY-1/tasks/7/failed").exists()


def test_the_tasks_of_an_array_job_that_its_user_has_renamed(slurm: Path) -> None:
    same = "JobName=mine WorkDir=/base/runs/KEY-1 ExitCode=0:0 SubmitTime=1 StartTime=2 EndTime=3"
    said = "\n".join(f"{same} ArrayTaskId={each}" for each in ("0 JobState=COMPLETED", "1 JobState=RUNNING"))
    put(slurm, "scontrol", f"cat <<'E'\n{said}\nE")
    put(slurm, "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    found, trouble = ends.verdicts("17", "KEY-1", 2, {0, 1}, {0, 1})
    assert trouble is None
    assert found[0]["state"] == "COMPLETED"
    assert found[1] is None


@pytest.mark.parametrize("array", [False, True])
def test_whoever_only_reads_the_output_of_a_run_does_not_submit_it(
    array: bool, prepare: Prepare, slurm: Path, tmp_path: Path
) -> None:
    """`scripts/job` follows a run whose submission waits for room, or has failed."""
    run, gateway = tmp_path / "runs" / "KEY-1", prepare()
    run.parent.mkdir(mode=0o700)
    files = files_of(PROJECT.load_site("musica"), "KEY-1", "true", 3) if array else {"job.sh": "#!/bin/sh\n"}
    run_directories.lay_out(str(run), files)
    put(slurm, "sbatch", f"touch '{tmp_path}/submitted'; echo 17")
    gateway.ping()  # it is connected
    threading.Timer(0.3, gateway.stop.set).start()
    with pytest.raises(StoppedError):
        if array:
            follow_jobs(gateway, Recorder(JobToFollow(str(run), None, [0])), follower="")
        else:
            gateway.run(str(run), None, {}, follower="")
    gateway.close()  # the agent finishes a submission that it has begun
    assert not (tmp_path / "submitted").exists()


class Asks(Recorder):
    """Makes a request whenever a task has started or ended."""

    def __init__(self, site: Site, gateway: Gateway) -> None:
        super().__init__(site.array, on_event=self.wish)
        self._gateway, self._wishes, self.requests = gateway, False, 0

    def wish(self, event: str) -> None:
        self._wishes |= event in ("started", "ended")

    def request_before(self) -> Callable[[], None] | None:
        return self._ask if self._wishes else None

    def _ask(self) -> None:
        self._wishes = False
        self._gateway.ping()
        self.requests += 1


def test_requests_while_an_array_job_is_followed_lose_nothing_and_double_nothing(
    slurm: Path, tmp_path: Path, prepare: Prepare
) -> None:
    site, gateway, tasks = Site(slurm, tmp_path, 4), prepare(HURRIED), range(4)
    seen, written = Asks(site, gateway), dict.fromkeys(tasks, "")

    def write_in_all(requests: int) -> None:
        """Write while a request is made."""
        while seen.requests < requests:
            for index in (each for each in tasks if each not in over):
                line = f"task {index}, {len(written[index])} bytes before\n"
                site.write(index, "stdout", line)
                written[index] += line
            time.sleep(0.01)

    with ThreadPoolExecutor(1) as pool:
        end, over = pool.submit(follow_jobs, gateway, seen, "run-1"), list(tasks)
        wait_until((site.run / "job").is_symlink, "it is submitted", 60)
        for index in tasks:
            site.start(index)
            over.remove(index)
            write_in_all(index + 1)
        for index in tasks:
            over.append(index)
            site.end(index)
            site.say(*(record(str(each), "COMPLETED" if each in over else "RUNNING") for each in tasks))
            write_in_all(len(tasks) + index + 1)
        end.result(60)
    assert seen.outcomes == dict.fromkeys(tasks, ("COMPLETED", 0))
    assert {index: seen.text(index) for index in tasks} == written
