"""What a job writes last: it comes before its end is reported."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from dagster_sbatch.slurm.gateway.agent import job_record
from dagster_sbatch.slurm.gateway.agent.job_record import Stream
from support.agent_fixtures import HURRIED, Prepare, put
from support.array_site import Follow, Site, record, wait_for_ends

KILLED = "*** JOB 17 ON n1 CANCELLED AT 2026-11-28T00:00:00 DUE TO TIME LIMIT ***\n"
HOLE = b'{"method": "opened"}\n' + bytes(2000) + b'\n{"method": "log"}\n'


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a run whose job is 17."""
    run = tmp_path / "runs" / "KEY"
    run.mkdir(parents=True, mode=0o700)
    for name in ("messages.jsonl", "stdout", "stderr", "events"):
        (run / name).touch()
    (run / "job").symlink_to("17")
    return run


def say_end(slurm: Path, state: str, before: str = "true") -> None:
    """Have Slurm say that the job has just ended; `before`: a command that runs each time before Slurm says so."""
    times = f"SubmitTime=100 StartTime=110 EndTime={int(time.time())}"
    put(slurm, "scontrol", f"{before}; echo 'JobName=KEY JobState={state} ExitCode=0:0 {times}'")


@pytest.mark.parametrize("code", ["null", "137"])
def test_what_slurm_writes_to_stderr_at_the_end_is_not_lost(
    code: str, run: Path, prepare: Prepare, slurm: Path
) -> None:
    """Slurm writes that after the job's own record, while the agent asks for the end."""
    sizes = {"stdout": 0, "stderr": 0, "messages.jsonl": 0}
    (run / "events").write_text(f'{{"code": {code}, "time": 1, "sizes": {json.dumps(sizes)}}}\n')
    say_end(slurm, "TIMEOUT", f"[ -s '{run}/stderr' ] || echo '{KILLED.strip()}' >>'{run}/stderr'")
    come = bytearray()
    end = prepare(HURRIED).run(str(run), None, {"stderr": come.extend}, follower="")
    assert (end.state, come.decode()) == ("TIMEOUT", KILLED)


def test_what_follows_a_hole_comes_though_the_job_was_killed(run: Path, prepare: Prepare, slurm: Path) -> None:
    """Its node has lost power: there is neither a record of the end nor one of the size."""
    (run / "messages.jsonl").write_bytes(HOLE)
    say_end(slurm, "NODE_FAIL")
    come = bytearray()
    end = prepare(HURRIED).run(str(run), None, {"messages.jsonl": come.extend}, follower="")
    assert (end.state, bytes(come)) == ("NODE_FAIL", HOLE)


FIRST = "a first line\n"


@pytest.mark.parametrize("lost", [False, True], ids=["connected", "the connection is lost meanwhile"])
@pytest.mark.parametrize(
    ("first", "later"),
    [
        (FIRST, "an error\n"),
        (FIRST, "a later line\n"),
        (FIRST, "a line that is longer\n"),
        (FIRST * 20, "much shorter\n"),
        (FIRST * 20, FIRST * 10),
        (FIRST * 20, "a line that is longer\n" * 20),
    ],
)
def test_what_a_program_writes_after_it_has_emptied_its_output_comes(
    first: str, later: str, lost: bool, run: Path, prepare: Prepare, slurm: Path
) -> None:
    """As `echo ... >/dev/stderr` in a script: the shell opens the file of the job anew, and empties it."""
    (run / "stderr").write_text(first)
    say_end(slurm, "RUNNING")
    come, pid = bytearray(), run.parent / "pid"

    def take(data: bytes) -> None:
        come.extend(data)
        if come.decode() == first:
            if lost:
                os.kill(int(pid.read_text()), signal.SIGKILL)
            (run / "stderr").write_text(later)
            (run / "events").write_text(f'{{"code": 3, "time": 1, "sizes": {{"stderr": {len(later)}}}}}\n')
            say_end(slurm, "FAILED")

    write_pid = f"import os, pathlib; pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))"
    end = prepare(f"{HURRIED}\n{write_pid}").run(str(run), None, {"stderr": take}, follower="")
    assert (come.decode(), end.code, end.short) == (first + later, 3, {})


def send_all(stream: Stream) -> bytes:
    sent = bytearray()
    stream.pump(lambda data, **_: sent.extend(data))
    return bytes(sent)


WHOLE = b"a first line\nanother line\n" * 10


@pytest.mark.parametrize("seen", [0, 150, 199])
@pytest.mark.parametrize("last", [WHOLE[136:200].decode(), ""], ids=["known", "a hole"])
def test_a_shorter_file_than_before_the_connection_was_lost_is_awaited(seen: int, last: str, tmp_path: Path) -> None:
    """Another login node may not see its end yet: it is not taken for one that a program has emptied."""
    (tmp_path / "stdout").write_bytes(WHOLE[:seen])
    stream = Stream(tmp_path / "stdout", "stdout", 200, last)
    assert send_all(stream) == b""
    assert job_record.short_of([stream], {}) == ({"stdout": 200} if last else {})
    (tmp_path / "stdout").write_bytes(WHOLE)
    assert send_all(stream) == WHOLE[200:]
    assert job_record.short_of([stream], {}) == {}


@pytest.mark.parametrize(("name", "again"), [("stdout", WHOLE[:150]), ("messages.jsonl", b"")])
def test_a_file_that_stays_shorter_counts_as_emptied_but_no_message_is_sent_twice(
    name: str, again: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step fails if messages do not come."""
    monkeypatch.setattr(job_record, "BEHIND", 0)
    (tmp_path / name).write_bytes(WHOLE[:150])
    stream = Stream(tmp_path / name, name, 200, WHOLE[136:200].decode())
    assert send_all(stream) == again
    assert job_record.short_of([stream], {}) == ({} if again else {name: 200})
    (tmp_path / name).unlink()
    assert send_all(stream) == b""
    assert job_record.short_of([stream], {}) == {}


def test_a_hole_that_is_filled_after_it_was_sent_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_record, "HOLE", 0)
    (tmp_path / "stdout").write_bytes(HOLE)
    stream = Stream(tmp_path / "stdout", "stdout", 0)
    assert send_all(stream) == HOLE
    (tmp_path / "stdout").write_bytes(HOLE.replace(b"\0", b"x") + b"end\n")
    assert send_all(stream) == b"end\n"


def test_a_connection_that_is_lost_while_the_accounting_is_asked_doubles_nothing(
    run: Path, prepare: Prepare, slurm: Path
) -> None:
    """The client has all output, and the end."""
    (run / "stdout").write_text("once\n")
    (run / "events").write_text('{"code": 0, "time": 1, "sizes": {"stdout": 5}}\n')
    say_end(slurm, "COMPLETED")
    put(slurm, "sacct", f"[ -e '{run}/killed' ] || {{ touch '{run}/killed'; kill -9 $PPID; }}; echo '17|COMPLETED||'")
    come, troubles = bytearray(), list[str]()
    end = prepare(HURRIED, troubles).run(str(run), None, {"stdout": come.extend}, follower="")
    assert (end.code, end.rows, come.decode(), len(troubles)) == (0, [["17", "COMPLETED", "", ""]], "once\n", 1)


@pytest.mark.parametrize("code", [None, 137])
def test_what_slurm_writes_to_stderr_at_the_end_of_a_task_is_not_lost(
    code: int | None, prepare: Prepare, slurm: Path, tmp_path: Path, follow: Follow
) -> None:
    """The task has recorded its end, and was read since."""
    site = Site(slurm, tmp_path, 1)
    seen = follow(site, prepare(HURRIED))
    site.start(0)
    site.end(0, code)
    site.wait_until_asked()
    site.say(record("0", "OUT_OF_MEMORY", str(int(time.time()))), before=f"echo oom_kill >>'{site.run}/tasks/0.stderr'")
    wait_for_ends(seen, 1)
    assert seen.text(0, "stderr") == "oom_kill\n"


@pytest.mark.parametrize("code", ["1", "null"])
def test_the_end_of_a_start_that_slurm_has_replaced_does_not_count(code: str, tmp_path: Path) -> None:
    """It ran on, on a node that Slurm took for dead: its record follows that of the start that replaced it."""
    starts = [f'{{"started": "n{time}", "time": {time}}}\n' for time in (1, 2)]
    end = '{{"code": {}, "began": {}, "time": 3}}\n'
    for own, others in ((0, code), (3, "0")):
        (tmp_path / "events").write_text("".join([*starts, end.format(own, 2), end.format(others, 1)]))
        found = job_record.events_of(str(tmp_path))
        assert (found["started"]["started"], found["end"]["code"]) == ("n2", own)
    (tmp_path / "events").write_text(end.format(0, 2))  # the file was removed under the job
    assert job_record.events_of(str(tmp_path))["end"]["code"] == 0


def test_output_that_is_removed_under_the_job_is_missing(run: Path, prepare: Prepare, slurm: Path) -> None:
    """The site has removed old files: what the job writes later comes nowhere. Slurm never made the other file."""
    (run / "stdout").write_text("a line\n")
    (run / "stderr").unlink()
    say_end(slurm, "RUNNING")

    def take(_: bytes) -> None:
        (run / "stdout").unlink()
        (run / "events").write_text('{"code": 0, "time": 1, "sizes": {"messages.jsonl": 0}}\n')
        say_end(slurm, "COMPLETED")

    end = prepare(HURRIED).run(str(run), None, {"stdout": take}, follower="")
    assert (end.code, end.short) == (0, {"stdout": 7})
