"""An agent on this machine that is in a hurry, and commands in place of Slurm's."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from dagster_sbatch.settings import Settings
from dagster_sbatch.slurm.gateway import Gateway, choose_channel, link, programs

HURRIED = """
import sys
def hurry():
    for name, values in {
        "shared_queue": dict(SQUEUE_EVERY=0.5, UNSHARED_EVERY=0.5),
        "slurm_commands": dict(COMMAND_PATIENCE=3),
        "jobs": dict(FIRST_PAUSE=0.1, ROOM_PAUSE=0.5),
        "follower": dict(SQUEUE_EVERY=0.5, UNSEEN=1, LAG=0.5, COMMAND_PATIENCE=3),
        "job_record": dict(HOLE=0.5, BEHIND=0.5),
    }.items():
        vars(sys.modules["agent." + name]).update(values)
    slurm = sys.modules["agent.slurm_commands"]
    for each in (slurm.call, slurm.ask_slurm, slurm.rows_of):
        each.__kwdefaults__["patience"] = 0.5
"""
NO_INODES = """
import os
made = dict(open=os.open, symlink=os.symlink, mkdir=os.mkdir)
def full(path):
    raise OSError(122, "Disk quota exceeded", path)
def open_(path, flags, *more, **named):
    return full(path) if flags & os.O_CREAT and not os.path.exists(path) else made["open"](path, flags, *more, **named)
os.open, os.symlink, os.mkdir = open_, lambda _, path: full(path), lambda path, *_: full(path)
"""
SETTINGS = Settings.model_validate({"SLURM_EDGE_NODE_HOST": "localhost"})
Prepare = Callable[..., Gateway]
WITHOUT_PROFILE = SimpleNamespace(profile=SimpleNamespace(charge=lambda: None))
"""An agent of a user whose login profile names no project."""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for Slurm's commands, where none does anything yet."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("squeue", "sacct", "scontrol", "scancel", "sbatch"):
        put(folder, name, "")
    return folder


def put(folder: Path, name: str, script: str) -> None:
    part = folder / f"{name}.part"
    part.write_text(f"#!/bin/sh\n{script}\n")
    part.chmod(0o755)
    part.rename(folder / name)


@pytest.fixture
def prepare(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Prepare]:
    """`prepare(code)` gives a gateway whose agent has run that Python code first."""
    made: list[Gateway] = []
    start = programs.START
    monkeypatch.setattr(link, "FIRST_PAUSE", 0.01)

    def make(code: str = "", told: list[str] | None = None) -> Gateway:
        changes = "[globals()[name]() for name in ('hurry', 'spoil') if name in globals()]"
        begin = f"[__import__(name) for name in names['TEXTS']]; {changes}; names['serve']()"
        monkeypatch.setattr(programs, "START", code + "\n" + start.replace("names['serve']()", begin))
        on_trouble = (lambda _: None) if told is None else told.append
        made.append(Gateway(choose_channel(SETTINGS, (), lambda _: None), on_trouble=on_trouble))
        return made[-1]

    yield make
    for gateway in made:
        gateway.close()
