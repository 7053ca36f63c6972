"""A copy whose owner has replaced the first asset by own ones, and changed nothing else."""

import sys
from pathlib import Path

import pytest

from support.new_project import made_in, replace_first_asset, run_in

pytestmark = pytest.mark.local


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    own = made_in(tmp_path_factory.mktemp("copy"), "valley")
    replace_first_asset(own)
    return own


def test_its_tests_pass(copy: Path) -> None:
    done = run_in(copy, sys.executable, "scripts/test", "-q", "-n", "0", "-m", "not cluster")
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_demo_shows_them(copy: Path, no_namespaces: str) -> None:
    """The newest partition of each, one task of the array."""
    done = run_in(copy, sys.executable, "scripts/demo", PATH=no_namespaces, COLUMNS="200")
    assert done.returncode == 0, done.stdout + done.stderr
    for asset, depth in {"stations": 0, "depths": len("south"), "melting": len("2026-11-05")}.items():
        (row,) = (line for line in done.stdout.splitlines() if line.startswith(f"│ {asset} "))
        assert f"depth {depth}" in row
