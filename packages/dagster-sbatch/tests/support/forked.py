"""Python programs in processes of their own: forked from one that has imported Dagster, which takes two seconds."""

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from support import ROOT

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["dagster", "dagster._core.storage.sqlite_storage", "dagster_sbatch.launchers", "dagster_sbatch.run.compute"]
)
"""Nothing among them reads a variable or a file of the project."""


class Forked:
    """A program that runs; it can be waited for and killed as one of `subprocess`."""

    def __init__(
        self, command: Sequence[str], variables: Mapping[str, str], output: Path, log: Path, folder: Path = ROOT
    ) -> None:
        """Start it.

        Args:
            command: the path of the program and its arguments.
            variables: its environment.
            output: gets its stdout.
            log: gets its stderr.
            folder: where it is started.
        """
        for path in (output, log):
            path.touch()
        self._process = _SERVER.Process(target=_become, args=(list(command), dict(variables), output, log, folder))
        self._process.start()
        self.pid = self._process.pid or 0

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("a forked program", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def run(
    command: Sequence[str], variables: Mapping[str, str], folder: Path = ROOT
) -> "subprocess.CompletedProcess[str]":
    """Run a program to its end; the arguments are those of `Forked`."""
    with TemporaryDirectory() as streams:
        output, log = Path(streams, "output"), Path(streams, "log")
        code = Forked(command, variables, output, log, folder).wait(120)
        return subprocess.CompletedProcess(command, code, output.read_text(), log.read_text())


def _become(command: list[str], variables: dict[str, str], output: Path, log: Path, folder: Path) -> None:
    """Execute the program in this process, as `python PROGRAM ARGUMENTS` does."""
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    for descriptor, path in enumerate((Path(os.devnull), output, log)):
        opened = os.open(path, os.O_RDWR)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = command
    sys.path[:0] = [str(Path(command[0]).parent), *variables.get("PYTHONPATH", "").split(os.pathsep)]
    runpy.run_path(command[0], run_name="__main__")
