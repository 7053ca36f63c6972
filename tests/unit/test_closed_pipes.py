"""Commands whose output nobody reads any more, as in `scripts/docs | head`, or on a full disk: no traceback."""

import os
import subprocess
import sys
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest

from resources import PROJECT
from support import ROOT

COMMANDS = "costs deploy_environment docs doctor job lock preview refresh_step_auth upgrade".split()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_ends_when_its_reader_is_gone(
    command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    main = import_module(f"dagster_sbatch.commands.{command}").main
    readable, writable = os.pipe()
    os.close(readable)
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with os.fdopen(writable, "w") as nobody_reads:
        monkeypatch.setattr(sys, "stdout", nobody_reads)
        assert main(*[PROJECT for _ in signature(main).parameters]) == 1
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_is_named() -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123
        command = [sys.executable, str(ROOT / "scripts" / "docs")]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "[Errno 28] No space left on device\n")


@pytest.mark.parametrize(
    "words",
    [["docs"], ["docs", "reference"], ["preview", "flights", "--partition", "2013-01"]],
    ids=" ".join,
)
def test_a_command_ends_when_its_reader_is_gone(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))  # no other test has it open
    (tmp_path / "dagster.yaml").touch()
    monkeypatch.setenv("SLURM_SUPERCOMPUTER_SITE", "musica")
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # as a user has it: Python writes at the end
    script, *arguments = words
    readable, writable = os.pipe()
    os.close(readable)
    try:
        done = subprocess.run(
            [sys.executable, str(ROOT / "scripts" / script), *arguments],
            stdout=writable, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    finally:
        os.close(writable)
    assert (done.returncode, done.stderr) == (1, "")
