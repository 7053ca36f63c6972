"""Claims on families of runs: whoever has lost one touches no job of the family any more."""

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, time
from types import SimpleNamespace
from typing import Any

import pytest

from dagster_sbatch.slurm.gateway import choose_channel
from dagster_sbatch.slurm.gateway.agent import claims, disk, jobs
from dagster_sbatch.slurm.gateway.channel import Channel
from slurm_in_a_box import wait_until
from support.agent_fixtures import SETTINGS, Prepare, put

OTHER = "token 2", "run 2"


@pytest.fixture
def agent(slurm: Path) -> Iterator[Channel]:
    """The connection to an agent, as a client has it that sends several requests at once."""
    channel = choose_channel(SETTINGS, (), lambda _: None)()
    yield channel
    channel.close()


def answers_of(agent: Channel) -> list[Any]:
    """Return what the agent answers to the first request until it leaves."""
    found, until = [], monotonic() + 20
    while monotonic() < until:
        try:
            found += [frame[0] for frame in [agent.receive()] if frame and frame[0]["id"] == 1]
        except EOFError:
            return found
    raise AssertionError(f"the agent does not leave: {found}")


@pytest.mark.parametrize(
    "request_", [{"do": "jobs.cancel"}, {"do": "jobs.run", "files": {"job.sh": ""}, "follower": "run-1"}]
)
def test_a_client_that_has_lost_its_claim_neither_cancels_nor_submits(
    request_: dict[str, Any], agent: Channel, prepare: Prepare, tmp_path: Path
) -> None:
    """It was cut off, and another client acts on its runs by now. Its next request comes right behind the claim."""
    runs = tmp_path / "runs"
    assert prepare().claim(str(runs), "family", *OTHER).held_by is None
    agent.send(do="claims.hold", runs=str(runs), family="family", token="token 1", who="run 1")
    agent.send(run=f"{runs}/family-1", **request_)
    assert [answer["held"] for answer in answers_of(agent)] == ["run 2"]
    assert [path.name for path in runs.iterdir()] == ["family.holder"]


@pytest.mark.parametrize("lost", ["another has it", "the folder is gone"])
def test_a_client_that_loses_its_claim_while_it_inherits_it_is_left(lost: str, agent: Channel, tmp_path: Path) -> None:
    """Its previous agent has ended, and another client was faster than its present one; or nobody can take it."""
    runs = tmp_path / "runs"
    runs.mkdir(mode=0o700)
    mine: dict[str, Any] = {"token": "token 1", "who": "run 1"}
    with (runs / "family.holder").open("w+") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        json.dump(mine, holder)
        holder.flush()
        agent.send(do="claims.hold", runs=str(runs), family="family", **mine)
        wait_until(lambda: (frame := agent.receive()) and frame[0]["id"] == 1, "the agent lets it in")
        if lost == "another has it":
            holder.seek(0)
            json.dump(dict(zip(("token", "who"), OTHER, strict=True)), holder)
            holder.flush()
        else:
            runs.rename(tmp_path / "removed")
        assert answers_of(agent) == [{"id": 1, "held": "run 2"}] * (lost == "another has it")


NO_CLAIM = """
def spoil():
    import os, sys
    def take(held, path, mine, take=sys.modules["agent.claims"].take):
        if os.path.exists({mark!r}):
            os.unlink({mark!r})
            raise OSError(116, "Stale file handle", path)
        return take(held, path, mine)
    sys.modules["agent.claims"].take = take
"""


def test_a_claim_that_fails_over_a_new_connection_is_repeated(prepare: Prepare, tmp_path: Path) -> None:
    """Otherwise a second client could act on the runs at the same time."""
    mark, troubles, runs = tmp_path / "mark", list[str](), f"{tmp_path}/runs"
    code = NO_CLAIM.format(mark=str(mark))
    first, second = prepare(code, troubles), prepare(code)
    assert first.claim(runs, "family", "token 1", "run 1").held_by is None
    first.close()
    mark.touch()
    assert first.ping()
    assert second.claim(runs, "family", *OTHER).held_by == "run 1"
    assert not mark.exists()
    assert troubles == [f"{runs}/family.holder: Stale file handle"]


@pytest.mark.parametrize(
    ("age", "codes", "over"),
    [(0, [], False), (0, [None], False), (0, [0], True), (120, [], True)],
    ids=["late", "late, after a preemption", "recorded", "killed"],
)
def test_a_claim_takes_no_end_for_final_whose_record_may_still_appear(
    age: int, codes: list[int | None], over: bool, prepare: Prepare, slurm: Path, tmp_path: Path
) -> None:
    """The job has recorded its success on another node, and this one does not see that yet. A minute later it does."""
    run, ended = tmp_path / "runs" / "family-1", int(time()) - age
    run.mkdir(parents=True, mode=0o700)
    (run / "job").symlink_to("17")
    for code in codes:
        (run / "events").write_text(json.dumps({"code": code, "time": ended, "sizes": {}}) + "\n")
    record = f"JobName=family-1 JobState=COMPLETED ExitCode=0:0 SubmitTime=100 StartTime=110 EndTime={ended}"
    put(slurm, "scontrol", f"echo '{record}'")
    (attempt,) = prepare().claim(str(run.parent), "family", "token 1", "run 1").attempts
    assert (attempt.over, [end.code for end in attempt.ends.values()]) == (over, [0 if codes == [0] else None] * over)
    assert (run / "end").exists() is over


@pytest.mark.parametrize("kind", ["job.sh", "tasks.jsonl"])
def test_a_run_that_was_cancelled_before_it_had_a_job_is_over(
    kind: str, prepare: Prepare, slurm: Path, tmp_path: Path
) -> None:
    """sbatch has never answered, and Slurm knows no such job. The next execution of the step submits a new attempt."""
    run, gateway = tmp_path / "runs" / "family-1", prepare()
    (run / "tasks").mkdir(parents=True, mode=0o700)
    (run / kind).write_text("{}\n")
    (run / "tried").touch()
    os.utime(run / "tried", (time() - 60, time() - 60))
    assert not gateway.claim(str(run.parent), "family", "token 1", "run 1").attempts[0].over
    assert gateway.cancel(str(run)) is None
    (attempt,) = gateway.claim(str(run.parent), "family", "token 1", "run 1").attempts
    assert attempt.over


def test_nothing_is_submitted_beside_a_job_that_its_user_has_renamed(slurm: Path, tmp_path: Path) -> None:
    """And whose run directory is not there: it was removed, or SLURM_DEPLOYMENT_BASE_PATH was another."""
    times = "SubmitTime=100 StartTime=110 EndTime=Unknown"
    put(slurm, "scontrol", f"echo 'JobName=mine JobState=RUNNING ExitCode=0:0 WorkDir=/my runs/family-1 {times}'")
    with pytest.raises(disk.RequestError, match=f"^Slurm job 17 .* is not in {tmp_path}: /my runs/family-1\n"):
        claims.refuse_beside_lost(str(tmp_path), "family", ["17"])


PATIENCE = """
def spoil():
    import sys
    vars(sys.modules["agent.jobs"]).update(LATE=0.5, SEARCH_EVERY=0.1)
"""


def test_a_clock_of_the_file_server_that_is_ahead_delays_nothing(prepare: Prepare, tmp_path: Path) -> None:
    """The time of the submission that got no answer is that of a file."""
    run = tmp_path / "runs" / "family-1"
    run.mkdir(parents=True, mode=0o700)
    (run / "tried").touch()
    os.utime(run / "tried", (time() + 3600, time() + 3600))
    begun = monotonic()
    assert prepare(PATIENCE).cancel(str(run)) is None
    assert monotonic() - begun < 20


def test_one_agent_at_a_time_submits_a_run_or_cancels_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one waits until the job has recorded itself: its sbatch, which has the lock, may hang."""
    record = SimpleNamespace(sleep=lambda _: (tmp_path / "job").symlink_to("17"))
    monkeypatch.setattr(jobs, "time", record)
    with jobs.locked(str(tmp_path)), jobs.locked(str(tmp_path)):
        assert (tmp_path / "job").is_symlink()


def test_a_claim_that_another_has_leaves_no_file_open(tmp_path: Path) -> None:
    """An agent may ask for the claim of its client's previous agent twice per second, for hours."""
    held: dict[str, int] = {}
    path, opened = f"{tmp_path}/family.holder", Path("/proc/self/fd")
    assert claims.take(held, path, {})
    before = sorted(each.name for each in opened.iterdir())
    assert not claims.take({}, path, {})
    assert sorted(each.name for each in opened.iterdir()) == before
    os.close(held[path])


def test_all_array_jobs_of_a_family_are_known_and_of_its_single_jobs_the_latest(tmp_path: Path) -> None:
    """Several array jobs can be active at once: one has tasks that another has not."""
    for number in (1, 2, 3):
        (tmp_path / f"family-{number}" / "tasks").mkdir(parents=True)
    (tmp_path / "family-1" / "tasks.jsonl").write_text("{}\n")
    assert [each["number"] for each in claims.attempts_of(str(tmp_path), "family")] == [1, 3]
