"""The agent as a plain subprocess: what it does with files and pipes, where there is no Slurm."""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dagster_sbatch.auth import AccessError
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm.gateway import (
    Gateway,
    LostClaimError,
    OtherRun,
    Questions,
    RefusedError,
    StoppedError,
    choose_channel,
    link,
)
from dagster_sbatch.slurm.gateway.channel import Channel
from dagster_sbatch.slurm.gateway.programs import SOURCE, START, without_comments
from dagster_sbatch.ssh import AuthenticationError, HostKeyError, SshError
from slurm_in_a_box import wait_until
from support import ENGINE, ROOT
from support.submission import submit_run

SERVE = "from dagster_sbatch.slurm.gateway.agent import server; server.SILENCE = {silence}; server.serve()"

SLOWLY = """
import os, sys, threading
from types import SimpleNamespace
from dagster_sbatch.slurm.gateway.agent import server
now, looked, stdin = [0], threading.Event(), sys.stdin.buffer
def sleep(_):
    looked.set()
    now[0] += os.path.exists({silent!r})
    threading.Event().wait(0.01)
def read1(_):
    data = stdin.read1(2)
    now[0] += 1
    looked.clear()
    looked.wait()
    return data
server.time = SimpleNamespace(monotonic=lambda: now[0], time=lambda: now[0], sleep=sleep)
server.sys = SimpleNamespace(stdin=SimpleNamespace(buffer=SimpleNamespace(read1=read1)), version=sys.version)
server.SILENCE = 3
server.serve()
"""
"""By the agent's clock, two bytes of the client arrive per second; with the file `silent`, the time passes without."""


@pytest.fixture
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH on which sbatch stands for a Slurm that refuses."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: Invalid qos specification' >&2\nexit 1\n")
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    return folder


@pytest.fixture
def open_gateway(no_slurm: Path) -> Iterator[Callable[[], Gateway]]:
    settings, made = Settings.model_validate({"SLURM_EDGE_NODE_HOST": "localhost"}), []

    def make() -> Gateway:
        made.append(Gateway(choose_channel(settings, (), lambda _: None)))
        return made[-1]

    yield make
    for gateway in made:
        gateway.close()


def start(program: str = SERVE.format(silence=60)) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-u", "-c", program],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def ask(agent: "subprocess.Popen[bytes]", **request: Any) -> None:
    assert agent.stdin
    agent.stdin.write(json.dumps({"id": 1, **request}).encode() + b"\n")
    agent.stdin.flush()


def answer(agent: "subprocess.Popen[bytes]") -> dict[str, Any]:
    assert agent.stdout
    found: dict[str, Any] = json.loads(agent.stdout.readline())
    return found


def meaning(code: str) -> list[str]:
    """What Python reads, with the line of each node; docstrings count as empty."""
    tree = ast.parse(code)
    texts = [
        node.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]
    for text in texts:
        text.value = ""
    return [f"{getattr(node, 'lineno', 0)} {ast.dump(node)}" for node in ast.walk(tree)]


@pytest.mark.parametrize("module", sorted((ENGINE / "slurm/gateway/agent").glob("*.py")), ids=lambda path: path.stem)
def test_a_module_of_the_agent_means_the_same_without_comments(module: Path) -> None:
    code = module.read_text()
    short = without_comments(code)
    assert meaning(short) == meaning(code)
    assert "  # " not in short
    assert not re.search('^ *"""', short, re.MULTILINE)


def test_the_agent_starts_without_modules_that_take_long_to_load() -> None:
    code = START.replace("names['serve']()", "print({'shutil', 'tempfile', 'traceback'} & set(sys.modules))")
    command = [sys.executable, "-I", "-S", "-c", code]
    assert subprocess.run(command, input=SOURCE, capture_output=True, check=True).stdout == b"set()\n"


def test_a_client_that_is_silent_is_left_and_one_that_is_slow_is_not(tmp_path: Path) -> None:
    """Of a slow client a long request comes in small pieces: each of them is a sign of life."""
    silent = tmp_path / "silent"
    with start(SLOWLY.format(silent=str(silent))) as agent:
        assert answer(agent)["hello"]
        ask(agent, do="server.ping", padding="x" * 60)
        assert answer(agent)["pong"]
        silent.touch()
        assert agent.wait(60) == 0


@pytest.mark.parametrize("last", [b"", b'{"id": 1, "do": "su'])
def test_it_leaves_when_its_client_is_gone(last: bytes) -> None:
    """Also in the middle of a request."""
    with start() as agent:
        assert answer(agent)["hello"]
        assert agent.stdin
        agent.stdin.write(last)
        agent.stdin.close()
        assert agent.wait(60) == 0


def test_a_request_that_makes_no_sense_is_answered(tmp_path: Path) -> None:
    with start() as agent:
        answer(agent)
        ask(agent, do="dance")
        assert answer(agent)["error"] == "broken"
        ask(agent, do="jobs.run", run=f"{tmp_path}/--wrap", files={}, follower="a-run")
        assert answer(agent) == {"id": 1, "error": "refused", "text": "'--wrap' is not a valid name of a run"}
        ask(agent, do="jobs.run", run=f"{tmp_path}/KEY", files={"../out": "x"}, follower="a-run")
        assert "is not a path below the run directory" in answer(agent)["refused"]
        assert list(tmp_path.iterdir()) == []
        assert agent.stdin
        agent.stdin.close()


def test_a_run_directory_is_there_as_a_whole_and_for_its_owner(
    open_gateway: Callable[[], Gateway], tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "KEY"
    files = {"job.sh": "#!/bin/sh\n", "workloads/a/b": "\0", "ä": "ö"}
    gateway = open_gateway()
    with pytest.raises(RefusedError, match="Invalid qos specification"):
        submit_run(gateway, str(run), files)
    assert run.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o077 == 0 for path in run.rglob("*") if path.is_file())
    assert (run / "workloads/a/b").read_bytes() == b"\0"
    assert (run / "ä").read_text() == "ö"
    assert (run / "stdout").read_bytes() == b""
    assert not (run / "tried").exists()
    with pytest.raises(RefusedError, match="exists already, with other content"):
        submit_run(gateway, str(run), {**files, "ä": "o"})
    with pytest.raises(RefusedError, match="Invalid qos specification"):
        submit_run(gateway, str(run), files)
    assert [path.name for path in run.parent.iterdir()] == ["KEY"]


def test_what_was_cancelled_first_is_not_submitted(open_gateway: Callable[[], Gateway], tmp_path: Path) -> None:
    gateway = open_gateway()
    assert gateway.cancel(str(tmp_path / "KEY")) is None
    for follower in ("a-run", ""):  # scripts/job submits nothing, and waits for the job of another client
        with pytest.raises(RefusedError, match="was cancelled before it was submitted"):
            submit_run(gateway, str(tmp_path / "KEY"), {"job.sh": ""}, follower)


def test_a_claim_is_lost_to_whoever_was_faster(open_gateway: Callable[[], Gateway], tmp_path: Path) -> None:
    """The first was cut off, its agent left, another came: when the first is back, it learns of that."""
    runs = str(tmp_path / "runs")
    first, second = open_gateway(), open_gateway()
    assert first.claim(runs, "family", "token 1", "run 1").held_by is None
    first.close()
    assert second.claim(runs, "family", "token 2", "run 2").held_by is None
    with pytest.raises(LostClaimError, match="run 2"):
        first.run(f"{runs}/family-1", None, {}, follower="")


def test_a_family_goes_on_from_its_latest_attempt(open_gateway: Callable[[], Gateway], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for name in ("family-9", "family-10", "family-10.new", "family-x", "family-other-11"):
        (runs / name).mkdir(parents=True)
    claim = open_gateway().claim(str(runs), "family", "token", "me")
    (attempt,) = claim.attempts
    assert (claim.number, attempt.over, attempt.ends, attempt.rejected) == (10, True, {}, frozenset())
    end = {"code": 0, "state": "COMPLETED", "exit": "0:0", "times": [1, 2, 3]}
    (runs / "family-10" / "job").symlink_to("17")
    (runs / "family-10" / "end").write_text(json.dumps(end))
    gateway = open_gateway()
    assert gateway.claim(str(runs), "family", "token", "me").number == 10
    gateway.reject(str(runs / "family-10"))  # answers nothing
    wait_until((runs / "family-10" / "failed").exists, "the mark", 60)
    (attempt,) = gateway.claim(str(runs), "family", "token", "me").attempts
    assert (attempt.job, attempt.over, [*attempt.rejected]) == ("17", True, [0])
    assert (attempt.ends[0].code, attempt.ends[0].ended) == (0, 3)


def test_what_else_a_step_has_there_is_reported(open_gateway: Callable[[], Gateway], tmp_path: Path) -> None:
    """Its runs with other inputs whose jobs may not be over, with what they were submitted with."""
    runs = tmp_path / "runs"
    marks = {
        "step-a-1": "end",
        "step-b-1": "",
        "step-b-2": "cancelled",
        "step-c-1": "",  # laid out and never submitted
        "step-d-1": "tried",  # its own
        "other-a-1": "",
        "step-e-1": "",  # its record cannot be read
        "step-g-1": "tried",  # sbatch has not answered
    }
    for name, mark in marks.items():
        (runs / name).mkdir(parents=True)
        if name not in ("step-c-1", "step-d-1", "step-g-1"):
            (runs / name / "job").symlink_to("17")
        if mark:
            (runs / name / mark).touch()
    record = {"call": 0, "inputs": {}, "request": {}}
    (runs / "step-b-1" / "submitted_with.json").write_text(json.dumps(record))
    claim = open_gateway().claim(str(runs), "step-d", "token", "me", Questions("step-"))
    assert list(claim.others) == [
        OtherRun("step-b", str(runs / "step-b-1"), "17", record),
        OtherRun("step-e", str(runs / "step-e-1"), "17", None),
        OtherRun("step-g", str(runs / "step-g-1"), None, None),
    ]
    assert not open_gateway().claim(str(runs), "step-f", "token", "me").others


def test_who_follows_a_run_is_noted(open_gateway: Callable[[], Gateway], tmp_path: Path) -> None:
    run = tmp_path / "runs" / "family-1"
    run.mkdir(parents=True)
    (run / "job").symlink_to("17")
    (run / "end").write_text(json.dumps({"code": 0, "state": "COMPLETED", "exit": "0:0", "times": [1, 2, 3]}))
    gateway = open_gateway()
    for follower in ("run-2", "run-1", "run-1"):
        assert submit_run(gateway, str(run), None, follower).how == "recorded"
    (run / "follower-run-3.node-7-7.part").touch()  # its agent was killed meanwhile
    assert gateway.claim(str(run.parent), "family", "token", "me").attempts[0].followers == ["run-2", "run-1"]


def test_runs_that_are_over_or_have_no_job_are_cleaned_up(open_gateway: Callable[[], Gateway], tmp_path: Path) -> None:
    runs, gateway = tmp_path / "runs", open_gateway()
    marks = {"a-1": "end", "a-2": "end", "a-3": "digest", "a-4": "tried", "b-1": "tried", "b-2": "tried"}
    marks |= {"c-1": "cancelled", "c-2": "cancelled"}  # which have nothing else
    for name, mark in marks.items():
        (runs / name).mkdir(parents=True)
        (runs / name / mark).touch()
    (runs / "a-4" / "cancelled").touch()
    (runs / "b-1" / "job").symlink_to("17")
    long_ago = time.time() - 40 * 86400
    (runs / "left-1.node-7-7.new").mkdir()
    (runs / ".queue-node.json.node-7-7.part").touch()
    for name in ("left-1.node-7-7.new", ".queue-node.json.node-7-7.part", "c-1"):
        os.utime(runs / name, (long_ago, long_ago))
    (runs / "gone.holder").touch()
    (runs / "b.holder").touch()
    assert sorted(gateway.clean(str(runs), ["a-1", "a-3", "a-4", "b-1", "b-2", "../b-1"])) == ["a-1", "a-3", "a-4"]
    assert sorted(path.name for path in runs.iterdir()) == ["a-2", "b-1", "b-2", "b.holder", "c-2"]


def test_a_file_goes_on_where_it_stopped(tmp_path: Path) -> None:
    content = os.urandom(1000)
    about = {"path": f"{tmp_path}/a file", "sha256": hashlib.sha256(content).hexdigest(), "bytes": 1000}
    for at in (0, 600):
        with start() as agent:
            answer(agent)
            ask(agent, do="transfer.put", **about)
            assert answer(agent)["at"] == at
            data = content[at : at + 600]
            ask(agent, do="transfer.put", at=at, size=len(data), **about)
            assert agent.stdin
            agent.stdin.write(data)
            agent.stdin.flush()
            assert answer(agent)["at"] == at + len(data)
            ask(agent, do="transfer.put", at=17, size=1, **about)
            agent.stdin.write(b"x")
            agent.stdin.flush()
            assert "error" in answer(agent)
    assert (tmp_path / "a file").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]


def test_no_secret_of_dagster_reaches_an_agent_on_this_machine(
    open_gateway: Callable[[], Gateway], no_slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASC_OIDC_APP_PASSWORD", "secret")
    monkeypatch.setenv("SBATCH_QOS", "wrong")
    (no_slurm / "sbatch").write_text(f"#!/bin/sh\nenv >'{tmp_path}/environment'\necho 17\n")
    assert open_gateway().test("#!/bin/sh\n") == (True, "17")
    names = {line.partition("=")[0] for line in (tmp_path / "environment").read_text().splitlines()}
    assert "SLURM_TIME_FORMAT" in names
    assert not {name for name in names if name.startswith(("ASC_", "SBATCH_"))}


def test_waiting_ends_when_it_is_stopped(open_gateway: Callable[[], Gateway], tmp_path: Path) -> None:
    gateway = open_gateway()
    (tmp_path / "KEY").mkdir()
    threading.Timer(0.3, gateway.stop.set).start()
    with pytest.raises(StoppedError):
        gateway.run(str(tmp_path / "KEY"), None, {}, follower="")


def test_a_login_that_has_worked_and_is_refused_is_tried_again(
    no_slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first time it is final: nothing is at stake yet."""
    monkeypatch.setattr(link, "DENIED_PAUSE", 0.01)
    local = choose_channel(Settings.model_validate({"SLURM_EDGE_NODE_HOST": "localhost"}), (), lambda _: None)
    told: list[str] = []
    refusals = [AuthenticationError("no"), AccessError("what to do"), AuthenticationError("no")]

    def open_channel() -> Channel:
        if refusals:
            raise refusals.pop()
        return local()

    gateway = Gateway(open_channel, on_trouble=told.append)
    with pytest.raises(AuthenticationError):
        gateway.runs(str(tmp_path))
    kept, refusals[:] = refusals[:], []
    assert gateway.runs(str(tmp_path)) == []
    gateway.close()
    refusals[:] = kept
    assert gateway.runs(str(tmp_path)) == []
    assert told == ["no certificate to log in with: what to do", "no"]
    gateway.close()


@pytest.mark.parametrize(
    "error",
    [
        HostKeyError("login02 is not trusted"),
        SshError("no common algorithm"),
        ConfigurationError("~/.ssh/config: ProxyCommand is not supported"),
        AuthenticationError("no"),
        AccessError("what to do"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_error_on_the_way_is_final_once_a_job_may_exist(
    error: Exception, no_slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "DENIED_PAUSE", 0.01)
    monkeypatch.setattr(link, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(link, "DENIED_PATIENCE", -1.0)  # a day has passed
    local = choose_channel(Settings.model_validate({"SLURM_EDGE_NODE_HOST": "localhost"}), (), lambda _: None)
    errors, told, recovered = [error] * 3, [], []

    def open_channel() -> Channel:
        if errors:
            raise errors.pop()
        return local()

    gateway = Gateway(
        open_channel, None, lambda text: told.append((text, gateway.blocked)), lambda: recovered.append(1)
    )
    with pytest.raises(type(error)):
        gateway.runs(str(tmp_path))
    gateway.committed = True
    assert gateway.runs(str(tmp_path)) == []
    assert [(text.endswith(str(error)), blocked) for text, blocked in told] == [(True, True)] * 2
    assert recovered == [1]
    gateway.close()
    errors[:] = [OSError("gone")]  # nobody has to do anything about that
    assert gateway.runs(str(tmp_path)) == []
    assert (told[2:], recovered) == ([("gone", False)], [1])
    gateway.close()
