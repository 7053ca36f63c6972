"""A script that is killed while it exchanges .venv for a new one: the next script makes it again."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT
from tests.unit.test_venv import BACKEND, PYPROJECT, run

KILLED = """
import os, sys
steps = 0
def watch(event, args):
    global steps
    changes = event == "open" and "installed.sha256" in str(args[0]) and (args[2] or 0) & os.O_WRONLY
    if changes or event == "os.rename":
        steps += 1
        if steps == int(sys.argv[1]):
            os._exit(9)
sys.addaudithook(watch)
import _environment
_environment.activate()
"""
"""Ends before a step of the exchange."""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with its environment, which is out of date."""
    files = {"scripts/killed": KILLED, "backend.py": BACKEND, "pyproject.toml": PYPROJECT, "requirements/dev.txt": ""}
    files |= {"scripts/show": "import _environment\n_environment.activate()\nprint('it works')\n"}
    files |= {"uv": f'#!/bin/sh\nexec {sys.executable} -m uv "$@"\n'}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "uv").chmod(0o755)
    shutil.copy(ROOT / "scripts" / "_environment.py", tmp_path / "scripts")
    return tmp_path


def script(project: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    places = f"{project}:{Path(sys.executable).resolve().parent}:/usr/bin:/bin"
    environment = {"PATH": places, "HOME": str(project), "UV_OFFLINE": "1"}
    return run([sys.executable, f"scripts/{words[0]}", *words[1:]], cwd=project, env=environment)


def test_the_next_script_makes_it_again_whatever_was_exchanged(project: Path) -> None:
    assert script(project, "show").stdout == "it works\n"
    step, killed = -2, True
    while killed:
        step += 3
        (project / "requirements" / "dev.txt").write_text(f"# {step}\n")
        killed = script(project, "killed", str(step)).returncode == 9
        done = script(project, "show")
        assert done.stdout == "it works\n", f"killed before step {step}: {done.stderr}"
    assert step > 10
    assert not list((project / ".venv").glob(".b*"))
