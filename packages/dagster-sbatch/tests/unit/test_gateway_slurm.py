"""What the agent makes of the words of Slurm's commands, said here by programs that stand in their place."""

import json
import os
import pwd
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dagster_sbatch.slurm.gateway.agent import (
    disk,
    ends,
    follower,
    jobs,
    run_directories,
    shared_queue,
    slurm_commands,
    tasks,
    usage,
)
from slurm_in_a_box import wait_until
from support import ROOT
from support.agent_fixtures import WITHOUT_PROFILE

Say = Callable[[str, str], None]
RUNNING = "JobId=17 JobName=KEY Account=p1 JobState=RUNNING ExitCode=0:0 SubmitTime=100 StartTime=110 EndTime=Unknown"
ENDED = "JobId=17 JobName=KEY Account=p1 JobState=COMPLETED ExitCode=0:0 SubmitTime=100 StartTime=110 EndTime=120"
RENAMED = "JobId=17 JobName=mine Account=p1 WorkDir=/my base/runs/KEY SubmitTime=100 StartTime=110 EndTime=120"
INVALID = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
LATER = 9999999999  # as an end that has just been: less than a minute ago, whatever the clocks show
AWAY = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Say:
    """`say(command, script)` lets one of Slurm's commands be that shell script."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "bin").mkdir()

    def put(command: str, script: str) -> None:
        part = tmp_path / "bin" / f"{command}.part"
        part.write_text(f"#!/bin/sh\n{script}\n")
        part.chmod(0o755)
        part.rename(tmp_path / "bin" / command)

    for command in ("squeue", "sacct", "scontrol", "sbatch"):
        put(command, "true")
    return put


@pytest.mark.parametrize(
    ("scontrol", "sacct", "expected"),
    [
        (f"echo '{RUNNING}'", "", None),
        (f"echo '{ENDED}'", "", ("COMPLETED", "0:0", [100, 110, 120], "p1")),
        (f"echo '{ENDED} Comment=JobState=FAILED'", "", ("COMPLETED", "0:0", [100, 110, 120], "p1")),
        # Its user has renamed it: scontrol update JobId=17 JobName=mine.
        (f"echo '{RENAMED} JobState=RUNNING ExitCode=0:0'", "echo 'RUNNING|0:0|100|110|Unknown|p1|mine|17'", None),
        (f"echo '{RENAMED} JobState=FAILED ExitCode=3:0'", "", ("FAILED", "3:0", [100, 110, 120], "p1")),
        (INVALID, "echo 'CANCELLED by 0|0:15|100|110|120|p1|KEY|17'", ("CANCELLED", "0:15", [100, 110, 120], "p1")),
        (INVALID, "echo 'COMPLETED+|0:0|100|Unknown|120|p1|KEY|17'", ("COMPLETED", "0:0", [100, None, 120], "p1")),
        (INVALID, "echo 'TIMEOUT|0:0|100|1|120|p1|mine|17|/my base/KEY'", ("TIMEOUT", "0:0", [100, 1, 120], "p1")),
        (INVALID, "echo '|0:0|100|110|120|p1|KEY|17'", ("", "", [None] * 3, "")),
        (AWAY, f"echo 'FAILED|3:0|100|110|{LATER}|p1|KEY|17'", ("FAILED", "3:0", [100, 110, LATER], "p1")),
        (AWAY, f"echo 'CANCELLED|0:0|100|None|{LATER}|p1|KEY|17'", ("CANCELLED", "0:0", [100, None, LATER], "p1")),
        (AWAY, "echo 'RUNNING|0:0|100|110|Unknown|p1|KEY|17'", None),
        # Until Slurm has put it back in the queue, the accounting has only the record of its first start.
        (AWAY, "echo 'PREEMPTED|0:15|100|110|120|p1|KEY|17'", "temporary"),
        (INVALID, "echo 'PREEMPTED|0:15|100|110|120|p1|KEY|17'", ("PREEMPTED", "0:15", [100, 110, 120], "p1")),
        # The accounting has the end before the processes have ended: they have some seconds, and may write meanwhile.
        (AWAY, f"echo 'CANCELLED by 0|0:15|100|110|{LATER}|p1|KEY|17'", "temporary"),
        (AWAY, f"echo 'TIMEOUT|0:15|100|110|{LATER}|p1|KEY|17'", "temporary"),
        (AWAY, "echo 'TIMEOUT|0:15|100|110|120|p1|KEY|17'", ("TIMEOUT", "0:15", [100, 110, 120], "p1")),
        # The id is another job's by now.
        (f"echo '{ENDED.replace('KEY', 'other')}'", "echo 'FAILED|1:0|1|2|3|p1|other|17'", ("", "", [None] * 3, "")),
        (INVALID, "echo 'FAILED|1:0|1|2|3|p1|other|17'", ("", "", [None] * 3, "")),
        # The controller has lost it: such a job runs in the accounting until an administrator ends it there.
        (INVALID, "echo 'RUNNING|0:0|100|110|Unknown|p1|KEY|17'", ("", "", [None] * 3, "")),
        (INVALID, "echo 'Slurm accounting storage is disabled' >&2; exit 1", ("", "", [None] * 3, "")),
        # An outage is no end.
        (AWAY, "", "temporary"),
        (AWAY, "echo 'Connection refused' >&2; exit 1", "temporary"),
        (INVALID, "echo 'Connection refused' >&2; exit 1", "temporary"),
    ],
)
def test_the_verdict_on_a_job(say: Say, scontrol: str, sacct: str, expected: Any) -> None:
    say("scontrol", scontrol)
    say("sacct", sacct)
    found, trouble = ends.verdicts("17", "KEY", 1, ends.SINGLE, ends.SINGLE)
    if isinstance(expected, str):
        assert (found, trouble.kind) == ({}, expected)
    else:
        assert (found[0] and tuple(found[0].values()), trouble) == (expected, None)


@pytest.mark.parametrize("array", [False, True])
def test_the_end_of_a_job_that_slurm_has_forgotten_is_recorded_after_a_while(
    say: Say, array: bool, tmp_path: Path
) -> None:
    """Or its run directory would stay for ever. Its own record may still appear."""
    say("scontrol", INVALID)
    (tmp_path / "KEY" / "tasks").mkdir(parents=True)
    if array:
        (tmp_path / "KEY" / "tasks.jsonl").write_text("{}\n{}\n")
        (tmp_path / "KEY" / "tasks" / "1.started").touch()
    for _ in range(2):
        assert tasks.Tasks(str(tmp_path / "KEY")).conclude("17")[0]["state"] == ""
        assert not (tmp_path / "KEY" / "end").exists()
    os.utime(tmp_path / "KEY" / "forgotten", (1, 1))
    assert tasks.Tasks(str(tmp_path / "KEY")).conclude("17")[0]["state"] == ""
    assert (tmp_path / "KEY" / "end").exists()


VIOLATES = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"


@pytest.mark.parametrize(
    ("sbatch", "expected"),
    [
        ("echo 17", "17"),
        ("echo 17\\;musica", "17"),
        ("echo '3 partitions'; echo 17; echo '12 node hours left'", "17"),
        ("echo 'noise without an id'", "temporary"),
        ("kill -9 $$", "temporary"),
    ],
)
def test_the_answers_of_sbatch(say: Say, sbatch: str, expected: str, tmp_path: Path) -> None:
    say("sbatch", sbatch)
    (tmp_path / "tried").touch()
    with jobs.locked(str(tmp_path)) as lock:
        if expected == "temporary":
            with pytest.raises(disk.RequestError) as failure:
                jobs.sbatch(str(tmp_path), lock, dict(os.environ))
            assert failure.value.kind == expected
        else:
            assert jobs.sbatch(str(tmp_path), lock, dict(os.environ)) == expected
    assert (tmp_path / "tried").exists()


@pytest.mark.parametrize(
    ("words", "kind", "submitted"),
    [
        ("Invalid qos specification", "refused", "no"),
        (f"QOSMaxWallDurationPerJobLimit\n{VIOLATES}", "refused", "no"),
        (f"AssocMaxCpuPerJobLimit\n{VIOLATES}", "refused", "no"),
        (f"QOSMaxSubmitJobPerUserLimit\n{VIOLATES}", "full", "no"),
        (f"AssocMaxSubmitJobLimit\n{VIOLATES}", "full", "no"),
        (f"QOSGrpSubmitJobsLimit\n{VIOLATES}", "full", "no"),
        (f"AssocMaxJobsLimit\n{VIOLATES}", "full", "no"),
        (VIOLATES, "full", "no"),
        ("Slurm backup controller in standby mode", "temporary", "no"),
        ("Could not establish a configuration source", "temporary", "no"),
        ("Job submission disabled", "temporary", "no"),
        ("Requested operation is presently disabled", "temporary", "no"),
        ("Required partition not available (inactive or drain)", "temporary", "no"),
        ("I/O error writing script/environment to file", "temporary", "no"),
        ("Slurm temporarily unable to accept job, sleeping and retrying", "temporary", "perhaps"),
        ("Resource temporarily unavailable", "temporary", "perhaps"),
        ("Socket timed out on send/recv operation", "temporary", "perhaps"),
        ("Zero Bytes were transmitted or received", "temporary", "perhaps"),
        ("Unable to contact slurm controller", "temporary", "perhaps"),
        ("Unexpected missing socket error", "temporary", "perhaps"),
        ("Header lengths are longer than data received", "temporary", "perhaps"),
        ("Received zero length message", "temporary", "perhaps"),
        ("Message receive failure", "temporary", "perhaps"),
        ("Broken pipe", "temporary", "perhaps"),
        ("Transport endpoint is not connected", "temporary", "perhaps"),
        ("No route to host", "temporary", "perhaps"),
        ("Network is unreachable", "temporary", "perhaps"),
        ("Invalid authentication credential", "temporary", "perhaps"),
    ],
)
def test_what_sbatch_refuses(say: Say, words: str, kind: str, submitted: str, tmp_path: Path) -> None:
    """What may pass is repeated; the queue is searched for the job only where there may be one."""
    (tmp_path / "words").write_text(words)
    say("sbatch", f"cat {tmp_path}/words >&2; exit 1")
    (tmp_path / "tried").touch()
    with jobs.locked(str(tmp_path)) as lock, pytest.raises(disk.RequestError) as failure:
        jobs.sbatch(str(tmp_path), lock, dict(os.environ))
    assert (failure.value.kind, str(failure.value)) == (kind, words)
    assert (tmp_path / "tried").exists() is (submitted == "perhaps")


def test_a_command_that_cannot_be_started_now_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tried").touch()
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with jobs.locked(str(tmp_path)) as lock:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, most))
        try:
            with pytest.raises(disk.RequestError, match="sbatch: Too many open files") as submission:
                jobs.sbatch(str(tmp_path), lock, dict(os.environ))
            with pytest.raises(disk.RequestError, match="squeue: Too many open files") as query:
                slurm_commands.call("squeue")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
    monkeypatch.setenv("PATH", str(tmp_path))  # a folder that this user cannot read would give another error
    with pytest.raises(disk.RequestError, match="squeue9: No such file or directory") as absent:
        slurm_commands.call("squeue9")
    assert [each.value.kind for each in (submission, query, absent)] == ["temporary", "temporary", "refused"]
    assert not (tmp_path / "tried").exists()  # there is no job to search the queue for


def test_a_job_is_found_that_began_by_slurms_clock_after_the_time_of_the_login_node(say: Say, tmp_path: Path) -> None:
    """sacct leaves out what began after its end, which is now, by the clock of the login node, unless it is named."""
    say("sacct", f'echo "$*" >{tmp_path}/asked; echo "17_3|/my base/KEY"')
    assert slurm_commands.find_by_folder("KEY", time.time()) == "17"
    assert "-S now-120seconds -E now+1days" in (tmp_path / "asked").read_text()


def test_a_folder_with_further_lines_does_not_disturb_the_queue(say: Say) -> None:
    say("squeue", "printf '7|RUNNING|None|1|/two\\na_b|p1\\n17|PENDING|Priority|2|/my base/KEY|p1\\n'")
    view = shared_queue.Queue().ask()
    row = ["PENDING", "Priority", "2", "KEY", "p1", {"PENDING": "0"}]
    assert (view["jobs"], view["trouble"]) == ({"17": row}, None)


@pytest.mark.parametrize(("earlier", "marked"), [("job.sh", True), ("tasks.jsonl", False)])
def test_the_next_attempt_ends_a_requeued_job_of_the_one_before(
    say: Say, earlier: str, marked: bool, tmp_path: Path
) -> None:
    """The job script looks for the mark. Of an array job, other tasks may run."""
    say("sbatch", "echo 17")
    for number, name in ((1, "job.sh"), (2, earlier), (3, "job.sh")):
        run_directories.lay_out(f"{tmp_path}/family-{number}", {"job.sh": "#!/bin/sh\n", name: ""})
    assert jobs.submit_once(f"{tmp_path}/family-3", "family-3", {"files": None}) == ("17", "submitted")
    marks = [(tmp_path / f"family-{number}" / "failed").exists() for number in (1, 2, 3)]
    assert marks == [False, marked, False]


SHOW_VARIABLES = 'echo 17; env | grep -E "^(SBATCH|SCANCEL|SCONTROL|SLURM|SQUEUE)_" | sort >"$(dirname "$0")/variables"'
EXPORTED = {
    "SBATCH_ACCOUNT": "p2", "SBATCH_PARTITION": "x", "SLURM_CONF": "/c", "SLURM_CONF_SERVER": "ctl:6817",
    "SLURM_JWT": "token", "SLURM_JOB_ID": "5", "SLURM_ACCOUNT": "p3", "SQUEUE_FORMAT": "%i",
    "SCANCEL_PARTITION": "x", "SCONTROL_FEDERATION": "1",
}  # fmt: skip
REACHES_SLURM = ["SLURM_CONF=/c", "SLURM_CONF_SERVER=ctl:6817", "SLURM_JWT=token"]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("#!/bin/bash\n#SBATCH --qos=q\n", ["SBATCH_ACCOUNT=p2", *REACHES_SLURM]),
        ("#!/bin/bash\n#SBATCH --account=p1\n", REACHES_SLURM),  # sbatch itself would prefer the variable
    ],
)
@pytest.mark.parametrize("way", ["submit", "test"])
def test_what_a_shell_exports_for_slurm(
    way: str, script: str, expected: list[str], say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in EXPORTED.items():
        monkeypatch.setenv(name, value)
    say("sbatch", SHOW_VARIABLES)
    if way == "test":
        assert slurm_commands.test(WITHOUT_PROFILE, {"script": script}, None)["code"] == 0
        expected = sorted([*expected, "SLURM_BITSTR_LEN=0", "SLURM_TIME_FORMAT=%s"])  # a job would see them
    else:
        (tmp_path / "tried").touch()
        (tmp_path / "job.sh").write_text(script)
        with jobs.locked(str(tmp_path)) as lock:
            jobs.sbatch(str(tmp_path), lock, jobs.environment_of(str(tmp_path)))
    assert (tmp_path / "bin" / "variables").read_text().splitlines() == expected


@pytest.mark.parametrize(
    ("sacctmgr", "exported", "rows", "default"),
    [
        ("echo 'p1|p1|a,b'; echo 'p1|p2|c'", "p2", [["p1", "p1", "a,b"], ["p1", "p2", "c"]], "p2"),
        ("echo 'p1|p1|a,b'", "", [["p1", "p1", "a,b"]], "p1"),
        ("exit 1", "p2", [], "p2"),
        ("exit 1", "", [], ""),
    ],
)
def test_the_projects_of_a_user(
    sacctmgr: str, exported: str, rows: list[list[str]], default: str, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_ACCOUNT", exported)
    say("sacctmgr", sacctmgr)
    known = usage.projects(WITHOUT_PROFILE, {}, None)
    assert known == {"rows": rows, "default": default, "exported": bool(exported)}


QUICK = """\
from dagster_sbatch.slurm.gateway.agent import follower, server, shared_queue
shared_queue.SQUEUE_EVERY, follower.SQUEUE_EVERY, follower.LAG = 0.5, 0.5, {lag}
server.serve()
"""


@pytest.mark.parametrize(
    ("meanwhile", "lag"), [("its word appears", 600), ("it is put back in the queue", 1), ("nothing", 1)]
)
def test_slurms_word_alone_is_not_believed_at_once(meanwhile: str, lag: float, say: Say, tmp_path: Path) -> None:
    """Slurm says that the job is over, and its own record is not there: a file system may lag, a job be requeued."""
    run, asked, again = tmp_path / "KEY", tmp_path / "asked", tmp_path / "again"
    run.mkdir()
    for name in ("messages.jsonl", "stdout", "stderr", "events"):
        (run / name).touch()
    (run / "job").symlink_to("17")
    ended = ENDED.replace("EndTime=120", f"EndTime={int(time.time())}")
    later = RUNNING if meanwhile == "it is put back in the queue" else ended
    say("scontrol", f"if [ -e {asked} ]; then touch {again}; echo '{later}'; else touch {asked}; echo '{ended}'; fi")
    command = [sys.executable, "-c", QUICK.format(lag=lag)]
    agent = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert agent.stdin and agent.stdout
    tasks = {"tasks": [0], "followed": [0], "offsets": {}}
    follow = {"id": 1, "do": "jobs.run", "run": str(run), "follower": "", **tasks, "fields": "JobID,State"}
    agent.stdin.write(json.dumps(follow).encode() + b"\n")
    agent.stdin.flush()
    wait_until(asked.exists, "Slurm is asked")
    if meanwhile == "it is put back in the queue":
        wait_until(again.exists, "Slurm is asked again")
    word = '{"code": 0, "time": 120, "sizes": {"stdout": 5, "stderr": 0, "messages.jsonl": 0}}\n'
    if meanwhile != "nothing":
        (run / "stdout").write_text("late\n")
        (run / "events").write_text(word)
    say("scontrol", f"echo '{ended}'")
    answers: list[dict[str, Any]] = []
    while not answers or "end" not in answers[-1]:
        answers.append(json.loads(agent.stdout.readline()))
        agent.stdout.read(answers[-1].get("size", 0))
    agent.stdin.close()
    agent.stdout.close()
    assert agent.wait(60) == 0
    end = answers[-1]["end"]
    assert (end["state"], end.get("code")) == ("COMPLETED", None if meanwhile == "nothing" else 0)
    assert [answer["size"] for answer in answers if "file" in answer] == ([] if meanwhile == "nothing" else [5])


@pytest.mark.parametrize(
    ("sacct", "ran", "expected"),
    [
        # It lags, and is asked again.
        (
            "[ -e asked ] && echo '17|COMPLETED|1' || { touch asked; echo '17|RUNNING|'; }",
            100,
            [["17", "COMPLETED", "1"]],
        ),
        # A twentieth of the job's time is all that it gets.
        ("echo '17|COMPLETED|1'; echo '17.0|RUNNING|'", 10, []),
        ("exec sleep 100", 10, []),
        ("echo '17|COMPLETED|1'", 1, []),
        ("exit 1", 100, []),
    ],
)
def test_the_accounting_of_a_job_that_is_over(
    sacct: str, ran: float, expected: list[list[str]], say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    say("sacct", sacct)
    begun = time.monotonic()
    assert slurm_commands.account("17", "JobID,State,MaxRSS", ran, {0}) == expected
    assert time.monotonic() - begun < 50


def test_a_directory_of_users_that_does_not_answer_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's commands take the number of a user as well."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert slurm_commands.user() == str(os.getuid())


def test_slurm_is_asked_again_soon_whether_a_job_that_was_cut_short_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its processes may have some seconds to end: the pauses begin with a second, and grow."""
    now, asked = [1000.0], []

    def find_ends(*_: str) -> tuple[dict[int, Any], set[int], None]:
        asked.append(now[0])
        return {}, set(), None  # it is COMPLETING

    monkeypatch.setattr(follower, "time", SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr(tasks.Tasks, "find_ends", find_ends)
    queue = SimpleNamespace(view={"at": 0.0})
    request = {"run": str(tmp_path / "KEY-1"), "offsets": {}, "fields": [], "tasks": [0], "followed": [0]}
    following = follower.Follower(queue, request, lambda **_: None, "17", None)
    following.schedule(0, now[0]).own = {"code": None}
    following.recorded = {0}
    now[0] += 100
    while now[0] < 1126:
        following.find_ends()
        queue.view["at"] = now[0] = now[0] + 0.1
    pauses = [later - earlier for earlier, later in pairwise(asked)]
    assert pauses == pytest.approx([1.1, 1.6, 2.4, 3.4, 5.1, 7.6], rel=0.1)
