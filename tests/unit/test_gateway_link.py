"""Requests that are sent ahead of their turn, to a real agent on this machine."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from resources.settings import Settings
from resources.slurm.gateway import Gateway, RefusedError, choose_channel
from resources.slurm.gateway.channel import Channel
from tests.simulated_site import wait_until

COUNT = """\
class Refused(Exception):
    pass

def answer(document):
    with open("{counted}", "a") as file:
        file.write("x")
    if "number" not in document:
        raise Refused("no number")
    return {{"number": document["number"]}}
"""


class Connections:
    """Opens channels to agents, and notes what is written to them."""

    def __init__(self) -> None:
        settings = Settings.model_validate({"SLURM_EDGE_NODE_HOST": "localhost"})
        self._open = choose_channel(settings, (), lambda _: None)
        self.writes = 0

    def __call__(self) -> Channel:
        channel: Any = self._open()
        write = channel.write

        def count(data: bytes) -> None:
            self.writes += 1
            write(data)

        channel.write = count
        return channel  # type: ignore[no-any-return]


@pytest.fixture
def connections() -> Connections:
    return Connections()


@pytest.fixture
def gateway(connections: Connections, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    monkeypatch.setenv("HOME", str(tmp_path))
    made = Gateway(connections)
    yield made
    made.close()


class Program:
    """Gives back the number that it is given, and notes that it ran."""

    def __init__(self, folder: Path) -> None:
        self._counted = folder / "counted"
        self.source = zlib.compress(COUNT.format(counted=self._counted).encode())

    @property
    def ran(self) -> int:
        return len(self._counted.read_text())

    def number(self, gateway: Gateway, number: int = 7) -> int:
        return int(gateway.consult(self.source, {"number": number})["number"])


def test_what_was_sent_ahead_costs_no_request(gateway: Gateway, connections: Connections, tmp_path: Path) -> None:
    program = Program(tmp_path)
    gateway.consult_ahead(program.source, lambda: {"number": 7})
    assert connections.writes == 0
    assert gateway.claim(str(tmp_path / "runs"), "family", "token", "me").held_by is None
    before = connections.writes
    assert program.number(gateway) == 7
    assert (connections.writes, program.ran) == (before, 1)
    assert program.number(gateway) == 7
    assert (connections.writes, program.ran) == (before + 1, 2)


def test_it_is_made_once_the_request_before_it_is_sent(
    gateway: Gateway, connections: Connections, tmp_path: Path
) -> None:
    gateway.ping()
    before, seen = connections.writes, []
    gateway.consult_ahead(Program(tmp_path).source, lambda: seen.append(connections.writes))
    gateway.ping()
    assert seen == [before + 1]
    assert connections.writes == before + 1, "nothing was to be sent"


def test_it_is_forgotten_when_something_else_is_asked(gateway: Gateway, tmp_path: Path) -> None:
    program = Program(tmp_path)
    gateway.consult_ahead(program.source, lambda: {"number": 7})
    gateway.ping()
    assert program.number(gateway, 8) == 8
    assert program.number(gateway) == 7
    wait_until(lambda: program.ran == 3, "nothing was taken for another", 10, 0.01)  # the first is not waited for


def test_it_is_asked_anew_after_a_lost_connection(gateway: Gateway, tmp_path: Path) -> None:
    program = Program(tmp_path)
    gateway.consult_ahead(program.source, lambda: {"number": 7})
    gateway.ping()
    gateway.close()
    assert program.number(gateway) == 7


def test_its_refusal_is_told_when_it_is_asked_for(gateway: Gateway, tmp_path: Path) -> None:
    program = Program(tmp_path)
    gateway.consult_ahead(program.source, dict)
    gateway.ping()
    with pytest.raises(RefusedError, match="no number"):
        gateway.consult(program.source, {})
