"""Fixtures of the local tests."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.new_project import plain_environment


@pytest.fixture
def no_namespaces(tmp_path: Path) -> str:
    """PATH on a machine that cannot have a simulated site."""
    (tmp_path / "unshare").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "unshare").chmod(0o755)
    return f"{tmp_path}:{plain_environment()['PATH']}"


@pytest.fixture
def same_handlers() -> Iterator[None]:
    """The command handles signals; pytest does so again afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
