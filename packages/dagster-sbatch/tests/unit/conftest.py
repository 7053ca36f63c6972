"""Fixtures of the unit tests."""

from pathlib import Path

import pytest

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
