"""The interpreters of the site, as the agent remembers them, and what the agent starts: on this machine."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from dagster_sbatch.slurm.gateway.agent import interpreters, releases
from dagster_sbatch.slurm.gateway.agent.building import HERE
from dagster_sbatch.slurm.gateway.agent.disk import RequestError, store
from dagster_sbatch.slurm.gateway.agent.interpreters import REMEMBERED, choose, in_setup
from slurm_in_a_box import wait_until

PYTHON = '#!/bin/sh\necho >>"{calls}"\nexec {python} "$@"\n'


class Interpreter:
    """A Python that counts how often it is asked."""

    def __init__(self, folder: Path) -> None:
        self.path, self._calls = folder / "a-python", folder / "calls"
        self.install()

    def install(self) -> None:
        self.path.unlink(missing_ok=True)
        self.path.write_text(PYTHON.format(calls=self._calls, python=os.path.realpath(sys.executable)))
        self.path.chmod(0o755)

    @property
    def asked(self) -> int:
        return len(self._calls.read_text().splitlines())


@pytest.fixture
def interpreter(tmp_path: Path) -> Interpreter:
    return Interpreter(tmp_path)


@pytest.fixture
def request_of_it(interpreter: Interpreter, tmp_path: Path) -> dict[str, Any]:
    folder = tmp_path / "environments"
    folder.mkdir()
    limits = {"oldest": [3, 11], "newest": [3, 99]}
    asked = {"asked": str(interpreter.path), "python": str(interpreter.path), "asked_by": "SLURM_PYTHON"}
    return {"folder": str(folder), "setup": [], "candidates": [], **asked, **limits}


def test_an_interpreter_is_asked_once(interpreter: Interpreter, request_of_it: dict[str, Any]) -> None:
    first = choose(request_of_it)
    assert first["executable"] == os.path.realpath(sys.executable)
    assert choose(request_of_it) == first
    assert interpreter.asked == 1
    choose({**request_of_it, "setup": ["true"]})
    assert interpreter.asked == 2


def test_it_is_asked_again_when_another_is_in_its_place(
    interpreter: Interpreter, request_of_it: dict[str, Any]
) -> None:
    choose(request_of_it)
    interpreter.path.rename(interpreter.path.with_name("kept"))  # its inode is not given to the new one
    interpreter.install()
    choose(request_of_it)
    assert interpreter.asked == 2
    interpreter.path.unlink()
    with pytest.raises(RequestError, match="does not run"):
        choose(request_of_it)


def test_it_is_asked_again_after_a_day(interpreter: Interpreter, request_of_it: dict[str, Any]) -> None:
    choose(request_of_it)
    (memory,) = Path(request_of_it["folder"]).iterdir()
    known = json.loads(memory.read_text())
    memory.write_text(json.dumps({**known, "at": known["at"] - REMEMBERED + 60}))
    choose(request_of_it)
    assert interpreter.asked == 1
    memory.write_text(json.dumps({**known, "at": known["at"] - REMEMBERED}))
    choose(request_of_it)
    assert interpreter.asked == 2
    memory.write_text(json.dumps({**known, "at": known["at"] + 3600}))  # the clock was ahead, perhaps by months
    choose(request_of_it)
    assert interpreter.asked == 3


def test_before_the_first_deployment_nothing_is_remembered(
    interpreter: Interpreter, request_of_it: dict[str, Any], tmp_path: Path
) -> None:
    nowhere = {**request_of_it, "folder": str(tmp_path / "none")}
    assert choose(nowhere) == choose(nowhere)
    assert interpreter.asked == 2
    assert not (tmp_path / "none").exists()


def test_production_refuses_an_environment_whose_interpreter_was_removed(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    environment, ask = tmp_path / "environments" / "a1", {"folder": str(tmp_path / "environments"), "group": ""}
    (environment / "bin").mkdir(parents=True)
    python = environment / "bin" / "python"
    python.symlink_to(interpreter.path)
    content = {**dict.fromkeys(releases.NEEDED), "name": "a1", "python": str(python)}
    store(str(environment / HERE), content)
    releases.publish(None, {**ask, "groups": {"": "a1"}, "about": {}}, None)
    assert releases.published(None, ask, None)["environment"]["name"] == "a1"
    interpreter.path.unlink()
    with pytest.raises(RequestError, match=rf"^{python} leads to a Python that was removed from .* Publish .*\n"):
        releases.published(None, ask, None)


SETUP = """\
from dagster_sbatch.slurm.gateway.agent.interpreters import in_setup
in_setup({"setup": []}, "sleep 300 & echo $$ $! >\\"$1.part\\"; mv \\"$1.part\\" \\"$1\\"; wait", PATH)
"""


def test_what_an_agent_has_started_ends_with_it_however_it_ends(tmp_path: Path) -> None:
    started = tmp_path / "started"
    with subprocess.Popen([sys.executable, "-c", SETUP.replace("PATH", repr(str(started)))]) as agent:
        wait_until(started.exists, "its children", 60)
        agent.kill()
    children = [int(pid) for pid in started.read_text().split()]
    wait_until(lambda: not any(map(is_running, children)), "the end of its children", 60)


def test_the_news_of_a_login_profile_are_no_part_of_an_error(
    request_of_it: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the setup commands print may be the reason. A profile that ends the shell has said why.

    It is read although POSIXLY_CORRECT is set, as `.bashrc` may have done.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("POSIXLY_CORRECT", "1")
    profile = tmp_path / ".bash_profile"
    profile.write_text("echo maintenance in 31 days\n")
    assert in_setup({"setup": ["echo no such stack"]}, "echo said; exit 3") == (3, "no such stack\nsaid\n")
    missing = {**request_of_it, "asked": "/none/python", "python": "/none/python"}
    with pytest.raises(RequestError, match=r"does not run on [^:]*: bash: line \d: /none/python: No such file"):
        choose(missing)
    profile.write_text("echo the disk is full; exit 1\n")
    with pytest.raises(RequestError, match=r"ended the shell, as `exit` and `exec zsh` do(.|\n)*\nthe disk is full\n"):
        choose(missing)


@pytest.mark.timeout(60)
def test_what_a_profile_leaves_in_the_background_is_not_waited_for(tmp_path: Path) -> None:
    """It has the same stdout, and ends with the command."""
    left = tmp_path / "left"
    code, said = in_setup({"setup": [f"sleep 300 & echo $! >'{left}'"]}, "echo said; exit 3")
    assert (code, said) == (3, "said\n")
    wait_until(lambda: not is_running(int(left.read_text())), "its end", 60)


@pytest.mark.timeout(60)
def test_a_daemon_that_a_profile_starts_is_not_waited_for_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has left the process group, so it lives on with the same stdout."""
    left = tmp_path / "left"
    monkeypatch.setattr(interpreters, "LAST_WORDS", 2.0)
    try:
        daemon = f'setsid sh -c \'echo $$ >"{left}.part"; mv "{left}.part" "{left}"; exec sleep 300\' &'
        setup = [daemon, f"until [ -e '{left}' ]; do sleep 0.02; done"]
        code, said = in_setup({"setup": setup}, "echo said; exit 3")
        assert (code, said) == (3, "said\n")
        assert is_running(int(left.read_text()))
    finally:
        os.kill(int(left.read_text()), signal.SIGKILL)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
