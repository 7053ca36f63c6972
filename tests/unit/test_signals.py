"""What starts Dagster does so with SIGINT and SIGTERM at their default actions, however it was itself started.

A shell without job control starts background processes with SIGINT ignored, and a process inherits what is ignored.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT

SHOW = """\
import json, signal
ignored = [number.name for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is signal.SIG_IGN]
"""


def run_with_ignored_signals(command: list[str], **variables: str) -> "subprocess.CompletedProcess[str]":
    def ignore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    return subprocess.run(
        command, env={**os.environ, **variables}, preexec_fn=ignore, capture_output=True, text=True, timeout=100,
        check=False, cwd=ROOT,
    )  # fmt: skip


def ignored_in(output: str) -> list[str]:
    line = next(line for line in output.splitlines() if line.startswith("ignored: "))
    found: list[str] = json.loads(line.removeprefix("ignored: "))
    return found


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Says what it ignores; it is also the module `dagster` in its folder."""
    (tmp_path / "dagster").mkdir()
    (tmp_path / "dagster" / "__init__.py").touch()
    path = tmp_path / "dagster" / "__main__.py"
    path.write_text(f"{SHOW}print('ignored:', json.dumps(ignored))\n")
    return path


def test_the_program_tells_what_is_ignored(program: Path) -> None:
    """So that the tests below compare more than empty lists."""
    done = run_with_ignored_signals([sys.executable, str(program)])
    assert ignored_in(done.stdout) == ["SIGINT", "SIGTERM"]


@pytest.mark.usefixtures("no_other_daemon")
def test_dev(program: Path) -> None:
    script = str(ROOT / "scripts" / "dev")
    done = run_with_ignored_signals([sys.executable, script], PYTHONPATH=str(program.parent.parent))
    assert ignored_in(done.stdout) == [], done.stderr


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "in a worker"])
def test_the_test_suite(program: Path, tmp_path: Path, workers: list[str]) -> None:
    """Started without scripts/test, too. The processes of its tests are what counts."""
    said, test = tmp_path / "said", tmp_path / "test_it.py"
    test.write_text(
        "import pathlib, subprocess, sys\n"
        "def test_it():\n"
        f"    said = subprocess.check_output([sys.executable, {str(program)!r}], text=True)\n"
        f"    pathlib.Path({str(said)!r}).write_text(said)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(ROOT / "pyproject.toml"), "-p", "conftest"]
    done = run_with_ignored_signals([*command, *workers, str(test)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert ignored_in(said.read_text()) == []


def test_an_interrupt_while_a_script_imports_dagster_shows_no_traceback(program: Path) -> None:
    (program.parent / "__init__.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)\n")
    command = [sys.executable, str(ROOT / "scripts" / "preview"), "flights"]
    variables = {**os.environ, "PYTHONPATH": str(program.parent.parent)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
