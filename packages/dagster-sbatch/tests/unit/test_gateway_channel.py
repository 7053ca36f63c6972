"""A channel to the agent whose other end does not do what it should: the client gives it up in time, and says why."""

import contextlib
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import paramiko
import psutil
import pytest

from dagster_sbatch.slurm.gateway import Gateway, channel, choose_channel, send_file
from dagster_sbatch.slurm.gateway.link import AgainError
from slurm_in_a_box import wait_until
from support.agent_fixtures import SETTINGS, Prepare
from unit.ssh_forge import Forge
from unit.test_ssh_connection import as_server, server, settings

HELLO = '{"id": 0, "hello": "gateway-agent 1"}'


class SilentShell(paramiko.ServerInterface):  # type: ignore[misc]
    """Lets everybody in, opens sessions, and does not answer when a command is to be started."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return int(paramiko.AUTH_SUCCESSFUL)

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return int(paramiko.OPEN_SUCCEEDED)

    def check_channel_exec_request(self, *_: object) -> bool:
        return self.over.wait(60)


def test_a_login_node_that_does_not_start_the_agent(forge: Forge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "DEAD_SECONDS", 0.5)
    silent = SilentShell()

    with server(as_server(forge, silent)) as port:
        (forge.folder / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{port} {forge.public('ed25519')}\n")
        with pytest.raises(OSError, match=r"^no channel: no answer within 0 s$"):
            choose_channel(settings(forge, port), ("python3",), lambda _: None)()
        silent.over.set()


WITHOUT_WORDS = {
    EOFError(): "the connection was closed",
    TimeoutError(): "no answer in time",
    OSError(9, "Bad file descriptor"): "[Errno 9] Bad file descriptor",
    paramiko.SSHException("Key-exchange timed out"): "Key-exchange timed out",
}


@pytest.mark.parametrize("error", WITHOUT_WORDS, ids=repr)
@pytest.mark.parametrize("when", ["exec_command", "sendall", "recv"])
def test_a_connection_that_is_lost_while_paramiko_works_is_an_error_with_a_text(
    when: str, error: Exception, forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which error it is depends on what paramiko's thread notices first; some of them have no text."""
    hanging = HangingProfile()
    hanging.over.set()
    with server(as_server(forge, hanging)) as port:
        (forge.folder / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{port} {forge.public('ed25519')}\n")
        if when == "exec_command":
            monkeypatch.setattr(paramiko.Channel, when, Mock(side_effect=error))
            with pytest.raises(OSError, match=f"^{re.escape(f'no channel: {WITHOUT_WORDS[error]}')}$"):
                choose_channel(settings(forge, port), ("python3",), lambda _: None)()
            return
        opened = choose_channel(settings(forge, port), ("python3",), lambda _: None)()
        while opened.receive() is None:  # the agent has greeted
            pass
        monkeypatch.setattr(paramiko.Channel, when, Mock(side_effect=error))
        with pytest.raises(OSError, match=f"^{re.escape(WITHOUT_WORDS[error])}$"):
            opened.send(do="server.ping") if when == "sendall" else opened._read(0)
        opened.close()


class HangingProfile(SilentShell):
    """Its login shell starts the agent once `over` is set, and that answers one request."""

    def check_channel_exec_request(self, *request: Any) -> bool:
        def run() -> None:
            self.over.wait(60)
            with contextlib.suppress(OSError, EOFError):  # it was given up
                request[0].sendall(f'{HELLO}\n{{"id": 1, "host": "login01"}}\n'.encode())

        threading.Thread(target=run).start()
        return True


def test_a_login_profile_that_hangs_is_waited_for_over_one_connection(
    forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each further connection would leave another shell on the login node, which does not end with it."""
    monkeypatch.setattr(channel, "DEAD_SECONDS", 0.5)
    hanging, told = HangingProfile(), list[str]()

    def hear(text: str) -> None:
        told.append(text)
        assert text == f"no answer for 0 s\n{channel.HANGS}"
        if len(told) == 3:
            hanging.over.set()

    with server(as_server(forge, hanging)) as port:  # it accepts one connection
        (forge.folder / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{port} {forge.public('ed25519')}\n")
        gateway = Gateway(choose_channel(settings(forge, port), ("python3",), lambda _: None), on_trouble=hear)
        assert gateway.ping() == "login01"
        gateway.close()
    assert len(told) == 3


@pytest.mark.parametrize("dead", [False, True])
def test_a_login_shell_that_starts_no_agent_is_given_up(
    dead: bool, forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a while; at once if the login node does not answer either."""
    monkeypatch.setattr(channel, "DEAD_SECONDS", 0.5)
    monkeypatch.setattr(channel, "SHELL_SECONDS", 60 if dead else 1)
    hanging, told = HangingProfile(), list[str]()
    if dead:
        monkeypatch.setattr(hanging, "check_global_request", lambda *_: hanging.over.wait(60), raising=False)
    with server(as_server(forge, hanging)) as port:
        (forge.folder / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{port} {forge.public('ed25519')}\n")
        opened = choose_channel(settings(forge, port), ("python3",), lambda _: None)()
        opened.on_trouble = told.append
        with pytest.raises(OSError, match="no answer for 0 s"):
            while opened.receive() is None:
                pass
        assert bool(told) is not dead
        opened.close()
        hanging.over.set()


@pytest.mark.usefixtures("slurm")
def test_a_login_profile_that_hangs_on_this_machine_ends_with_the_connection(tmp_path: Path) -> None:
    before = psutil.Process().children(recursive=True)
    opened = choose_channel(SETTINGS, (), lambda _: None, setup=[f"echo $$ > '{tmp_path}/shell'; sleep 987"])()
    wait_until((tmp_path / "shell").exists, "the profile hangs")
    opened.close()
    assert set(psutil.Process().children(recursive=True)) <= set(before)


class NoSessions(SilentShell):
    """As one with MaxSessions in sshd_config, or without processes to spare."""

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return int(paramiko.common.OPEN_FAILED_RESOURCE_SHORTAGE)


@pytest.mark.usefixtures("slurm")
@pytest.mark.parametrize("late", [False, True])
def test_a_login_profile_that_ends_the_shell_is_named(
    late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`late`: the shell has ended before the agent's source is written."""
    popen = subprocess.Popen

    def start(*args: Any, **named: Any) -> Any:
        child = popen(*args, **named)
        if late:
            child.wait(60)
        return child

    monkeypatch.setattr(subprocess, "Popen", start)
    (tmp_path / ".bash_profile").write_text("echo news; exec true\n")
    opened = choose_channel(SETTINGS, (), lambda _: None, setup=("true",))()
    with pytest.raises(EOFError, match=r"no agent: news\n(.|\n)*whether the login profile there exits, or"):
        while opened.receive() is None:
            pass
    opened.close()


def test_a_login_node_that_opens_no_session(forge: Forge) -> None:
    with server(as_server(forge, NoSessions())) as port:
        (forge.folder / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{port} {forge.public('ed25519')}\n")
        with pytest.raises(OSError, match=r"^no channel: Resource shortage$"):
            choose_channel(settings(forge, port), ("python3",), lambda _: None)()


@pytest.fixture
def opened(prepare: Prepare) -> Iterator[channel.Channel]:
    """A channel to an agent on this machine."""
    prepare()
    found = choose_channel(SETTINGS, (), lambda _: None)()
    yield found
    found.close()


def test_an_agent_on_this_machine_that_stands_still(opened: channel.Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a file system that does not answer: it reads nothing, and a pipe holds 64 KiB."""
    monkeypatch.setattr(channel, "_WRITE_SECONDS", 0.5)
    agent = max(psutil.Process().children(), key=psutil.Process.create_time)
    agent.suspend()
    try:
        with pytest.raises(TimeoutError, match="the agent has accepted nothing for "):
            opened.send(b"x" * (1 << 20), do="server.ping")
    finally:
        agent.kill()


class Canned(channel.Channel):
    """Receives these lines."""

    def __init__(self, *lines: str) -> None:
        super().__init__()
        self._left = [f"{line}\n".encode() for line in lines]

    def _read(self, seconds: float) -> bytes:
        if not self._left:
            raise TimeoutError
        return self._left.pop(0)

    def _write(self, data: bytes) -> None:
        """Nobody reads it."""

    def _complaint(self) -> str:
        return "python3: no memory"

    def close(self) -> None:
        """There is nothing to close."""


@pytest.mark.parametrize(
    ("greeting", "said"), [(["Welcome"], "\npython3: no memory\nWelcome"), ([HELLO], "")], ids=["none", "has come"]
)
def test_silence_in_place_of_a_greeting_shows_what_has_come(
    greeting: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For instance of an interpreter that fails after it has read the agent's source: the next one waits for it."""
    monkeypatch.setattr(channel, "DEAD_SECONDS", 0)
    received = Canned(*greeting)
    assert received.receive() is None
    with pytest.raises(OSError, match="no answer for 0 s") as raised:
        received.receive()
    assert str(raised.value) == f"no answer for 0 s{said}"


@pytest.mark.parametrize("noise", ["updating ...", "42", '["a"]', '{"a": 1}', "null"])
def test_what_others_write_between_two_answers_is_no_answer(noise: str) -> None:
    received = Canned(HELLO, '{"id": 1}', noise)
    assert received.receive() is None
    assert received.receive() == ({"id": 1}, b"")
    with pytest.raises(OSError, match="something other than the agent writes to the connection: b'") as raised:
        received.receive()
    assert noise in str(raised.value)


def test_a_slow_disk_does_not_end_an_upload(prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent answers pings while it writes: a large file may take longer than the client waits for a dead agent."""
    for name, seconds in {"DEAD_SECONDS": 0.8, "PING_SECONDS": 0.2, "READ_SECONDS": 0.1}.items():
        monkeypatch.setattr(channel, name, seconds)
    slow = "def spoil():\n    import os, time\n    os.fsync = lambda _: time.sleep(2)\n"
    told: list[str] = []
    (tmp_path / "wheel").write_bytes(b"x" * 100_000)
    assert send_file(prepare(slow, told), tmp_path / "wheel", f"{tmp_path}/sent") == 100_000
    assert (tmp_path / "sent").read_bytes() == b"x" * 100_000
    assert told == []


@pytest.mark.usefixtures("slurm")
def test_an_agent_starts_however_much_the_setup_commands_complain() -> None:
    gateway = Gateway(choose_channel(SETTINGS, (), lambda _: None, setup=["head -c 300000 /dev/zero >&2"]))
    assert gateway.ping()
    gateway.close()


def test_a_request_that_nobody_waits_for_leaves_the_loss_to_those_that_wait(prepare: Prepare) -> None:
    """A step that follows an array job rejects results meanwhile."""
    gateway = prepare()
    answers = gateway.exchange([{"do": "server.ping"}])
    next(answers)
    agent = max(psutil.Process().children(), key=psutil.Process.create_time)
    agent.kill()
    agent.wait()
    gateway.notify(do="server.ping")
    with pytest.raises(AgainError, match="the connection was closed"):
        next(answers)
