"""How the doctor reads a login node's answers, whatever its commands print."""

import errno
import resource
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest

from dagster_sbatch.commands import doctor
from dagster_sbatch.inspect.diagnosis import examine, login_node, make, slurm_jobs, this_machine
from dagster_sbatch.inspect.diagnosis.finding import Facts, Finding
from dagster_sbatch.inspect.diagnosis.room import Room, parse_room
from dagster_sbatch.inspect.remote_runs import RunRecord, Runs
from dagster_sbatch.run.directory import RunInfo
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm import Site
from dagster_sbatch.slurm.gateway import Gateway, StoppedError
from dagster_sbatch.slurm.gateway.agent import survey
from dagster_sbatch.slurm.gateway.channel import HANGS
from dagster_sbatch.slurm.site import Partition
from resources import PROJECT

HEAD = "Filesystem         Avail  Inodes  IFree\n"
HOME = "nas:/home       51380224 1000000 999990\n"
QUOTA = "Quotas of xy12345 (uid 1001):\n  Filesystem  blocks  quota  limit  grace  files  quota  limit  grace\n"


@pytest.mark.parametrize(
    ("df", "quotas", "room"),
    [
        (HOME, "", Room(51380224, 999990)),
        ("with spaces in /it 600 50 30\n", "", Room(600, 30)),
        ("nas:/home 51380224 0 0\n", "", Room(51380224, None)),
        ("nas:/home 51380224 - -\n", "", Room(51380224, None)),
        ("", "", Room(None, None)),
        ("nas:/home -10 1000000 999990\n", "", Room(0, 999990)),
        (HOME, "nas:/home 40000 0 50000 0 900 1000 0 0\n", Room(10000, 100)),
        (HOME, "nas:/home 40000* 30000 50000 1700000000 1000* 1000 1000 0\n", Room(10000, 0)),
        (HOME, "nas:/data 40000 0 50000 0 900 1000 0 0\n", Room(51380224, 999990)),
        (HOME, "nas:/home 40000 0 0 0 900 0 0 0\n", Room(51380224, 999990)),
        (HOME, "sh: quota: not found", Room(51380224, 999990)),
        (HOME, "nas:/home none\n", Room(51380224, 999990)),
    ],
)
def test_room(df: str, quotas: str, room: Room) -> None:
    assert parse_room(HEAD + df if df else "", QUOTA + quotas if quotas.startswith("nas") else quotas) == room


def test_room_in_words() -> None:
    assert str(Room(51380224, 999990)) == "49.0 GB and 999,990 files free"
    assert str(Room(1024, None)) == "0.0 GB free"
    assert str(Room(None, None)) == "free space not known"


def facts_of(address: tuple[str, int], folder: Path) -> Facts:
    facts = Facts(PROJECT, dg.DagsterInstance.ephemeral, ExitStack())
    facts.settings = Settings(
        SLURM_EDGE_NODE_HOST=address[0],
        SLURM_EDGE_NODE_PORT=address[1],
        SLURM_EDGE_NODE_USER="me",
        SLURM_EDGE_NODE_KEY_PATH=folder / "key",
    )
    return facts


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(this_machine, "TCP_SECONDS", 0.5)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_that_there_is_no_access_is_said_once(tmp_path: Path) -> None:
    state, found, fix = this_machine.check_credentials(facts_of(("login.example", 22), tmp_path))
    assert state == "broken"
    assert found.startswith("No access to login.example. One of these is enough, and none of them works:\n  1. a valid")
    assert "access" not in fix


@pytest.mark.usefixtures("short_patience")
def test_a_network_from_which_port_22_times_out(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, ExitStack() as stack:
        for _ in range(4):  # the places in the queue; from then on, packets are dropped as by a firewall
            waiting = stack.enter_context(socket.socket())
            waiting.settimeout(0)
            waiting.connect_ex(server.getsockname())
        state, found, fix = this_machine.check_port(facts_of(server.getsockname(), tmp_path))
    assert state == "broken"
    assert found.endswith("does not answer within 0 s: this network does not reach it")
    assert "network that the centre admits" in fix
    assert "VPN" in fix


def test_a_machine_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_route(*_: object) -> None:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", no_route)
    state, found, fix = this_machine.check_port(facts_of(("127.0.0.1", 22), tmp_path))
    assert (state, found) == ("broken", "127.0.0.1 (port 22): Network is unreachable")
    assert "this machine's network" in fix


@pytest.mark.usefixtures("short_patience")
def test_a_server_that_says_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        state, found, _ = this_machine.check_port(facts_of(server.getsockname(), tmp_path))
    assert (state, "accepts a connection, but sends nothing" in found) == ("broken", True)


def test_an_agent_that_stops_answering_is_no_traceback(tmp_path: Path) -> None:
    """Its time limit ends the requests with an error without text."""

    class Silent:
        def all(self) -> None:
            raise StoppedError

    facts = facts_of(("login.example", 22), tmp_path)
    facts.runs = Silent()  # type: ignore[assignment]
    state, found, _ = make(slurm_jobs.check_jobs, facts)
    assert (state, found) == ("broken", "the login node has not answered everything within 240 s")


@pytest.mark.parametrize(("known", "state"), [("retry", "ok"), ("other", "warning")])
def test_a_job_is_strange_if_none_of_its_runs_is_known(known: str, state: str, tmp_path: Path) -> None:
    """A person may have deleted the run that has submitted it, and a retry has adopted it."""
    about = RunInfo(run="deleted", root="deleted", asset="a", partitions="", step="a")
    job = RunRecord("/runs/a-1", "7", about, None, datetime.now(UTC), ("deleted", "retry"))
    facts = facts_of(("login.example", 22), tmp_path)
    running = SimpleNamespace(state=lambda _: ("RUNNING", None))
    facts.runs = SimpleNamespace(all=lambda: [job], gateway=running)  # type: ignore[assignment]
    facts.instance = SimpleNamespace(has_run=lambda run: run == known)  # type: ignore[assignment]
    assert make(slurm_jobs.check_jobs, facts).state == state


Look = Callable[..., dict[str, Any]]


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Look:
    """Take the survey of this machine, with this df and these variables; the login profile sets no other."""

    def take(df: str, **variables: str) -> dict[str, Any]:
        (tmp_path / "df").write_text(f"#!/bin/sh\n{df}\n")
        (tmp_path / "df").chmod(0o755)
        for name, value in {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path), **variables}.items():
            monkeypatch.setenv(name, value)
        agent = SimpleNamespace(profile=SimpleNamespace(value=lambda _: ""))
        return survey.survey(agent, {"path": f"{tmp_path}/no folder/base"}, None)  # type: ignore[no-any-return, no-untyped-call]

    return take


@pytest.mark.parametrize(
    ("df", "room"),
    [
        ("exit 0", Room(None, None)),
        ("echo stale NFS file handle >&2; exit 1", Room(None, None)),
        ("echo 'nas:/home 51380224 0 0'", Room(51380224, None)),
    ],
    ids=["nothing", "an error", "no inodes"],
)
def test_a_df_that_says_little(look: Look, df: str, room: Room) -> None:
    found = look(df)
    assert {name: parse_room(said, found["quota"]) for name, (_, said) in found["rooms"].items()} == {
        "HOME": room,
        "base": room,
    }


def test_a_df_that_does_not_end(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "PATIENCE", 0.5)
    assert look("sleep 987")["rooms"]["base"][1] == "df did not answer within 0 s"


def test_the_folders_that_the_login_profile_names_are_checked(look: Look, tmp_path: Path) -> None:
    (tmp_path / "a folder").mkdir()
    found = look("printf '%s 9 9 9\\n' \"$3\"", SCRATCH=str(tmp_path / "a folder"))
    assert found["rooms"]["SCRATCH"] == (f"{tmp_path}/a folder", f"{tmp_path}/a folder 9 9 9")
    assert "DATA" not in found["rooms"]
    assert (found["above"], found["refusal"]) == (str(tmp_path), "")
    assert {path.name for path in tmp_path.iterdir()} == {"a folder", "df"}


def test_a_port_that_is_not_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        state, found, fix = this_machine.check_port(facts_of(server.getsockname(), tmp_path))
        thread.join()
    assert (state, "is not an SSH server: 'HTTP/1.1 400" in found) == ("broken", True)
    assert fix == "check SLURM_EDGE_NODE_PORT"


def test_the_doctor_stops_at_wrong_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_SUPERCOMPUTER_SITE", "musica")
    monkeypatch.setenv("SLURM_EDGE_NODE_PORT", "ssh")
    ((name, finding),) = examine(PROJECT, open_instance=lambda: pytest.fail("the doctor continues"))
    assert (name, finding.state, "SLURM_EDGE_NODE_PORT" in finding.found) == ("settings", "broken", True)


def test_partitions_that_slurm_does_not_list_are_not_wrong(tmp_path: Path) -> None:
    facts = facts_of(("login.example", 22), tmp_path)
    facts.site = Site(partitions={"cpu": Partition(cores=1, mem="1G")})
    facts.survey = {"partitions": [124, ""]}
    state, found, fix = login_node.check_partitions(facts)
    assert (state, found) == ("broken", "no answer to `scontrol show partition`")
    assert fix == "try again later, or ask the centre"
    facts.survey = {"partitions": [0, "PartitionName=gpu State=UP"]}
    assert login_node.check_partitions(facts)[1] == "there is no partition cpu"


def test_a_login_node_that_runs_no_commands_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, tries = facts_of(("login.example", 22), tmp_path), list[str]()

    def refuse() -> Any:
        tries.append("login")
        raise OSError("no channel: Administratively prohibited")

    monkeypatch.setattr(login_node, "open_runs", lambda *_: nullcontext(Runs(Gateway(refuse), facts.settings)))
    state, found, fix = make(login_node.check_login, facts)
    assert (state, found, tries) == ("broken", "no channel: Administratively prohibited", ["login"])
    assert fix == "do what the message says; or try again, and check what your login shell does"


def test_a_login_shell_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = facts_of(("login.example", 22), tmp_path)
    silent: Any = SimpleNamespace(exchange=lambda *_, **__: iter(()))

    def open_runs(*arguments: Any) -> Any:
        arguments[-1](f"no answer for 45 s\n{HANGS}")
        return nullcontext(Runs(silent, facts.settings))

    monkeypatch.setattr(login_node, "open_runs", open_runs)
    state, found, _ = make(login_node.check_login, facts)
    text = f"the login node has not answered within 120 s\nno answer for 45 s\n{HANGS}"
    assert (state, found) == ("broken", text)


def test_a_long_temporary_folder(look: Look, tmp_path: Path) -> None:
    facts = facts_of(("login.example", 22), tmp_path)
    facts.survey = look("exit 0", TMPDIR=f"/tmp/{'x' * 60}")
    state, found, _ = login_node.check_temporary_folder(facts)
    assert (state, found) == ("warning", f"/tmp/{'x' * 60} has 65 characters")


def test_a_login_node_without_a_limit_on_open_files(tmp_path: Path) -> None:
    facts = facts_of(("login.example", 22), tmp_path)
    facts.survey = {"files": resource.RLIM_INFINITY}
    assert login_node.check_open_files(facts) == ("ok", "unlimited", "")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("asset weather", "ok      asset weather     job 7\n                          -> wait\n"),
        (
            "asset long_weather",
            "ok      asset long_weather\n                          job 7\n                          -> wait\n",
        ),
    ],
)
def test_what_is_found_is_in_one_column(name: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    doctor.show(name, Finding("ok", "job 7", "wait"))
    assert capsys.readouterr().out == shown
