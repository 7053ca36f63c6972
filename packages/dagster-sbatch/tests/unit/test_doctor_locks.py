"""The doctor and locks, with real agents on this machine that stand for those on two login nodes."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from dagster_sbatch.inspect.diagnosis import make, slurm_jobs
from dagster_sbatch.inspect.diagnosis.finding import Facts
from dagster_sbatch.inspect.remote_runs import Runs
from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm.gateway import Gateway, choose_channel, programs
from resources import PROJECT

pytestmark = pytest.mark.usefixtures("slurm")  # with sbatch on PATH, this machine is the login node

NAMED = "import os\nos.uname = lambda: ('Linux', {host!r})\n"
LOCAL = "import fcntl\nfcntl.flock = lambda *_: None\n"


def found(hosts: list[str], second: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[str, str, str]:
    """What the doctor says where connections come to these login nodes; `second`: what is so with all but the first."""
    settings = Settings.model_validate(
        {"SLURM_EDGE_NODE_HOST": "localhost", "SLURM_DEPLOYMENT_BASE_PATH": f"{tmp_path}/base"}
    )
    start, names = programs.START, cycle(hosts)
    opened = 0

    @contextmanager
    def open_runs(*_: Any) -> Iterator[Runs]:
        nonlocal opened
        opened += 1
        code = NAMED.format(host=next(names)) + (second if opened > 1 else "")
        monkeypatch.setattr(programs, "START", code + start)
        gateway = Gateway(choose_channel(settings, (), lambda _: None))
        try:
            yield Runs(gateway, settings)
        finally:
            gateway.close()

    monkeypatch.setattr(slurm_jobs, "open_runs", open_runs)
    facts = Facts(PROJECT, lambda: pytest.fail("not needed"), ExitStack())
    facts.settings = settings
    return make(slurm_jobs.check_locks, facts)


def test_a_lock_is_seen_on_another_login_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    verdict = found(["login01", "login01", "login02"], "", monkeypatch, tmp_path)
    assert verdict == ("ok", "login02 respects a file lock of login01", "")


def test_a_lock_that_only_its_own_node_sees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state, text, fix = found(["login01", "login02"], LOCAL, monkeypatch, tmp_path)
    assert (state, text.partition(":")[0]) == ("warning", "a file lock of login01 is not seen on login02")
    assert "SLURM_EDGE_NODE_HOST" in fix


def test_one_login_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    state, text, _ = found(["login01"], "", monkeypatch, tmp_path)
    assert state == "ok"
    assert "no other login node was reached" in text


def test_what_the_agent_refuses_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base").chmod(0o777)
    state, text, _ = found(["login01"], "", monkeypatch, tmp_path)
    assert state == "broken"
    assert f"chmod go-w '{tmp_path}/base'" in text
