"""Fixtures of the local tests."""

from pathlib import Path

import pytest

from support.new_project import plain_environment


@pytest.fixture
def no_namespaces(tmp_path: Path) -> str:
    """PATH on a machine that cannot have a simulated site."""
    (tmp_path / "unshare").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "unshare").chmod(0o755)
    return f"{tmp_path}:{plain_environment()['PATH']}"
