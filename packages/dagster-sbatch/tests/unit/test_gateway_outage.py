"""How often the login node and Slurm are asked while they fail: real clients and agents, whose clocks run faster."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm.gateway import Gateway, JobEnd, RefusedError, StoppedError, choose_channel, link, programs
from dagster_sbatch.slurm.gateway import channel as channels
from dagster_sbatch.slurm.gateway.agent.server import HELLO
from dagster_sbatch.slurm.gateway.channel import Channel
from slurm_in_a_box import wait_until
from support.agent_fixtures import HURRIED, Prepare, put
from support.dagster_dev import gone

SPEED = 60
"""Seconds on these clocks per second."""
OUTAGE = 600.0
MOST_LOGINS, MOST_LOGINS_OF_TWENTY = 30, 120
FAST = """
import sys, time
def speed_up(clock, sleep):
    time.time = time.monotonic = lambda: {since} + (clock() - {since}) * {speed}
    time.sleep = lambda seconds: sleep(seconds / {speed})
speed_up(time.time, time.sleep)
"""
SLURM = {
    "sbatch": """echo '{"code": 0, "time": 1, "sizes": {}}' >>"$3/events"; echo "${3##*-}" """,
    "scontrol": """echo "JobName=sweep-$4 JobState=COMPLETED ExitCode=0:0 SubmitTime=1 StartTime=1 EndTime=2" """,
    "squeue": "",
    "sacct": "",
}
CALLED = """#!/bin/sh
echo {name} >>"{folder}/calls"
if down=$(cat "{folder}/down" 2>/dev/null); then echo "$down" >&2; exit 1; fi
{script}
"""


class Stop(threading.Event):
    """Waits as long as the fast clock says."""

    def wait(self, timeout: float | None = None) -> bool:
        return super().wait(timeout and timeout / SPEED)


class Clock(threading.Event):
    """A clock that each wait winds on at once."""

    now = 0.0

    def wait(self, timeout: float | None = None) -> bool:
        self.now += timeout or 0
        return self.is_set()


class Logins:
    """Opens agents on this machine, and counts them."""

    def __init__(self) -> None:
        self.count = 0
        self._open = choose_channel(Settings.model_validate({"SLURM_EDGE_NODE_HOST": "localhost"}), (), lambda _: None)

    def __call__(self) -> Channel:
        self.count += 1
        return self._open()


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder: Slurm's commands say what its file `down` says, for as long as that is there; `calls` has each call."""
    (tmp_path / "bin").mkdir()
    for name, script in SLURM.items():
        command = tmp_path / "bin" / name
        command.write_text(CALLED.format(name=name, folder=tmp_path, script=script))
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def set_clock(monkeypatch: pytest.MonkeyPatch, clock: Callable[[], float]) -> None:
    """Let the client have this clock."""
    for module in (channels, link):
        monkeypatch.setattr(module, "monotonic", clock)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    server = 'sys.modules["agent.server"]'
    patient = f"{server}.SILENCE *= {SPEED}; names['serve']()"  # pings come as often as ever
    assert "names['serve']()" in programs.START
    start = programs.START.replace("names['serve']()", patient)
    monkeypatch.setattr(programs, "START", FAST.format(speed=SPEED, since=time.time()) + start)
    set_clock(monkeypatch, lambda: time.monotonic() * SPEED)
    monkeypatch.setattr(channels, "PING_SECONDS", channels.PING_SECONDS * SPEED)
    monkeypatch.setattr(channels, "DEAD_SECONDS", channels.DEAD_SECONDS * SPEED)
    monkeypatch.setattr(channels, "READ_SECONDS", channels.READ_SECONDS / SPEED)


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(
    "words",
    [
        "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
        "sbatch: error: QOSMaxSubmitJobPerUserLimit\n"
        "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size "
        "and/or time limits)",
    ],
    ids=["no controller", "submit limit"],
)
def test_ten_minutes_without_slurm(words: str, slurm: Path) -> None:
    """Twenty runs wait over the connections that they have; each tells its trouble, and is submitted afterwards."""
    (slurm / "down").write_text(words)
    told: list[set[str]] = []
    logins = [Logins() for _ in range(20)]

    def run(number: int) -> JobEnd:
        troubles: set[str] = set()
        told.append(troubles)
        gateway = Gateway(logins[number], Stop(), troubles.add)
        sinks = dict.fromkeys(("messages.jsonl", "stdout", "stderr"), lambda _: None)
        files = {"job.sh": "#!/bin/sh\n"}
        try:
            gateway.claim(str(slurm / "runs"), f"family{number}", "token", "me")
            return gateway.run(f"{slurm}/runs/sweep-{number}", files, sinks, "a-run")
        finally:
            gateway.close()

    with ThreadPoolExecutor(len(logins)) as pool:
        begun = time.monotonic()
        ends = [pool.submit(run, number) for number in range(len(logins))]
        wait_until(lambda: len(told) == sum(any(words in text for text in [*each]) for each in told) == len(logins),
                   "each run has told its trouble", 120)  # fmt: skip
        time.sleep(max(OUTAGE / SPEED - (time.monotonic() - begun), 0))
        calls = Counter((slurm / "calls").read_text().split())
        outage = (time.monotonic() - begun) * SPEED
        (slurm / "down").unlink()
        assert [each.result(60).code for each in ends] == [0] * len(logins)
    counts = [each.count for each in logins]
    print(f"20 runs: {sum(counts)} logins, at most {max(counts)} of one; Slurm calls: {dict(calls)}")
    assert max(counts) <= MOST_LOGINS
    assert sum(counts) <= MOST_LOGINS_OF_TWENTY
    assert calls["sbatch"] <= 30 * len(logins) * outage / OUTAGE
    assert calls["squeue"] <= 20 * outage / 15
    waits = [text for troubles in told for text in troubles if "this step waits until others have ended" in text]
    assert len(waits) == (len(told) if "Submit" in words else 0)


def cut(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> Channel:
    """Lose a connection as soon as something of a job's output has come over it."""
    read, come = channel._read, 0

    def read_or_lose(seconds: float) -> bytes:
        nonlocal come
        if come > 1 << 18:
            raise EOFError("cut")
        data = read(seconds)
        come += len(data)
        return data

    monkeypatch.setattr(channel, "_read", read_or_lose)
    return channel


@pytest.mark.parametrize("way", ["nobody is let in", "each connection is cut"])
def test_a_login_node_that_fails_is_not_hammered(way: str, slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, logins = Clock(), Logins()
    set_clock(monkeypatch, lambda: clock.now)
    run = slurm / "runs" / "sweep-1"
    run.mkdir(parents=True, mode=0o700)
    (run / "stdout").write_bytes(b"x" * (1 << 24))
    (run / "job").symlink_to("17")

    def open_channel() -> Channel:
        if clock.now > OUTAGE:
            clock.set()
        if way == "nobody is let in":
            logins.count += 1
            raise OSError("connection refused")
        return cut(logins(), monkeypatch)

    gateway = Gateway(open_channel, clock)
    with pytest.raises(StoppedError):
        gateway.run(str(run), None, {"stdout": lambda _: None}, follower="")
    gateway.close()
    print(f"{way}: {logins.count} logins")
    assert 5 < logins.count <= MOST_LOGINS


@pytest.fixture
def gateway(slurm: Path) -> Iterator[tuple[Gateway, Logins, list[str]]]:
    logins, told = Logins(), list[str]()
    made = Gateway(logins, Clock(), told.append)
    yield made, logins, told
    made.close()


def test_an_error_of_the_agent_itself_ends_a_request_and_is_shown(
    gateway: tuple[Gateway, Logins, list[str]],
) -> None:
    asked, logins, told = gateway
    with pytest.raises(RefusedError, match=r"the gateway agent failed:[^$]*No module named 'agent.dance'"):
        asked.ask(do="dance")
    assert logins.count == 1
    assert len(told) == link.BROKEN_TRIES - 1


class SlowAgent(Channel):
    """Works for longer than any pause on each request, and then answers with an error, or is gone.

    If it is `cut`, it is gone after a part of its answer, at once.
    """

    SECONDS = link.LONGEST_PAUSE + 5

    def __init__(self, clock: Clock, kind: str) -> None:
        self._clock, self._kind = clock, kind
        self.asked, self.ended = list[float](), list[float]()

    def __call__(self) -> Channel:
        super().__init__()
        self._out, self._ident = bytearray(f"{HELLO}\n".encode()), 0
        return self

    def _write(self, data: bytes) -> None:
        request = json.loads(data)
        if request["do"] == "server.ping":
            self._out += json.dumps({"id": request["id"], "pong": True}).encode() + b"\n"
            return
        self._ident = request["id"]
        self.asked.append(self._clock.now)
        if self._kind == "cut":
            self._out += json.dumps({"id": self._ident, "progress": "", "size": 1}).encode() + b"\nx"
        if len(self.asked) > 12:
            self._clock.set()

    def _read(self, seconds: float) -> bytes:
        late = bool(self._ident) and self._clock.now - self.asked[-1] > self.SECONDS
        if late or (self._kind == "cut" and self._ident and not self._out):
            self.ended.append(self._clock.now)
            if self._kind in ("lost", "cut"):
                return b""
            answer = {"id": self._ident, "error": self._kind, "text": "the environment cannot be built"}
            self._out += json.dumps(answer).encode() + b"\n"
            self._ident = 0
        if not self._out:
            self._clock.now += seconds
            raise TimeoutError
        data = bytes(self._out)
        self._out.clear()
        return data

    def _complaint(self) -> str:
        return ""

    def close(self) -> None:
        pass


def ask_slow_agent(kind: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the pauses between the tries of a request that ends with an error."""
    clock = Clock()
    agent = SlowAgent(clock, kind)
    set_clock(monkeypatch, lambda: clock.now)
    monkeypatch.setattr("random.uniform", lambda _, most: most)
    with pytest.raises(error):
        link.Link(agent, clock).ask(do="building.build")
    return [asked - ended for asked, ended in zip(agent.asked[1:], agent.ended, strict=False)]


def test_slow_broken_answers_end_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build of an environment can take minutes and fail each time."""
    assert len(ask_slow_agent("broken", RefusedError, monkeypatch)) == link.BROKEN_TRIES - 1


def test_slow_temporary_answers_are_repeated_with_growing_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = ask_slow_agent("temporary", StoppedError, monkeypatch)
    expected = [min(link.FIRST_PAUSE * 2**number, link.LONGEST_PAUSE) for number in range(len(pauses))]
    assert len(pauses) == 12
    assert pauses == pytest.approx(expected, abs=2 * channels.READ_SECONDS)


@pytest.mark.parametrize("kind", ["lost", "cut"])
def test_the_loss_of_a_connection_that_has_lasted_or_brought_something_is_followed_by_a_short_pause(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "LOGINS_SECONDS", 0.0)
    assert ask_slow_agent(kind, StoppedError, monkeypatch) == pytest.approx([link.FIRST_PAUSE] * 12)


def test_no_command_of_slurm_stays_when_its_client_is_gone(slurm: Path, prepare: Prepare, tmp_path: Path) -> None:
    """A database that is slow to answer may keep sacct for minutes."""
    pid = tmp_path / "pid"
    put(slurm / "bin", "squeue", f"echo $$ >'{pid}.new'; mv '{pid}.new' '{pid}'; exec sleep 600")
    gateway = prepare()
    gateway.ping()
    gateway.notify(do="usage.usage", since=None)
    wait_until(pid.exists, "squeue runs")
    gateway.close()
    wait_until(lambda: gone(int(pid.read_text())), "squeue has ended")


def test_no_login_profile_stays_when_its_client_is_gone(prepare: Prepare, tmp_path: Path) -> None:
    """One that waits for a file system may wait for hours."""
    pid = tmp_path / "pid"
    gateway = prepare()
    gateway.ping()
    (tmp_path / ".bash_profile").write_text(f"echo $$ >'{pid}.new'; mv '{pid}.new' '{pid}'; exec sleep 600\n")
    gateway.notify(do="run_directories.runs", runs="$DATA/runs")
    wait_until(pid.exists, "the profile is read")
    gateway.close()
    wait_until(lambda: gone(int(pid.read_text())), "its shell has ended")


SET_BACK = """
import os, time
def set_back(clock):
    time.time = lambda: clock() - 3600 * os.path.exists({mark!r})
set_back(time.time)
"""


def test_the_clock_of_the_login_node_is_set_back(slurm: Path, prepare: Prepare, tmp_path: Path) -> None:
    """What was due by the old clock would be due in an hour: for instance the end of a job that has recorded none."""
    mark, run = tmp_path / "mark", slurm / "runs" / "KEY"
    run.mkdir(parents=True, mode=0o700)
    for name in ("messages.jsonl", "stdout", "stderr", "events"):
        (run / name).touch()
    (run / "job").symlink_to("17")
    put(slurm / "bin", "squeue", "echo '17|RUNNING|None|N/A|KEY|p1'")
    gateway = prepare(f"{HURRIED}\n{SET_BACK.format(mark=str(mark))}")
    states: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        follow = partial(gateway.run, on_state=lambda state: states.append(state.state))
        end = pool.submit(follow, str(run), None, {}, "")
        try:
            wait_until(lambda: states == ["RUNNING"], "it is followed", 60)
            put(slurm / "bin", "squeue", "")
            record = "JobName=KEY JobState=CANCELLED ExitCode=0:15 SubmitTime=100 StartTime=110 EndTime=120"
            put(slurm / "bin", "scontrol", f"echo '{record}'")
            mark.touch()
            assert end.result(30).state == "CANCELLED"
        finally:
            gateway.stop.set()
            gateway.close()
