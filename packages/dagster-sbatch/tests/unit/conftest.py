"""Fixtures of the unit tests."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from sqlalchemy import event
from sqlalchemy.pool import Pool

from support.agent_fixtures import *  # noqa: F403
from support.array_site import *  # noqa: F403
from support.played_slurm import *  # noqa: F403
from unit.ssh_forge import Forge


@pytest.fixture
def forge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Forge:
    """Keys, in the home of this test."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    return Forge(tmp_path)


@pytest.fixture(autouse=True)
def databases_are_closed() -> Iterator[None]:
    """A test that leaves a database of Dagster's open fails.

    If a thread of a later test collects the garbage, SQLite refuses to close the database there, and that test fails.
    """
    opened = {}

    def note(_: object, record: object, *_proxy: object) -> None:
        opened[id(record)] = record

    def forget(_: object, record: object) -> None:
        opened.pop(id(record), None)

    event.listen(Pool, "checkout", note)
    event.listen(Pool, "checkin", forget)
    yield
    event.remove(Pool, "checkout", note)
    event.remove(Pool, "checkin", forget)
    assert not opened


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    """A Dagster instance in memory."""
    with dg.DagsterInstance.ephemeral() as made:
        yield made
