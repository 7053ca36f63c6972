"""Wheels for the supercomputer, downloaded and built on this machine."""

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dagster_sbatch.children import NETWORK, child_environment
from dagster_sbatch.environments.lockfile import Interpreter, LockFile
from dagster_sbatch.errors import ConfigurationError

POLL_SECONDS = 5.0  # between two calls of `alive` while pip works
_REPRODUCIBLE = {"SOURCE_DATE_EPOCH": "315532800"}
"""1980, the first year that a zip file can hold: the same source makes the same wheel."""


@dataclass(frozen=True)
class Wheel:
    """A wheel on this machine."""

    path: Path
    digest: str  # SHA-256 of the file
    size: int  # in bytes

    @property
    def place(self) -> str:
        """Path below the folder of wheels on the supercomputer; its content decides it."""
        return f"{self.digest[:16]}/{self.path.name}"


def gather_wheels(lock: LockFile, interpreter: Interpreter, folder: Path, alive: Callable[[], object]) -> list[Wheel]:
    """Download every wheel of a lock file that an interpreter needs; build those that exist as source only.

    pip's own configuration decides about indices, proxies, credentials and the cache. pip and the build code of
    packages get nothing else of this process's environment.

    `folder`: an empty folder for the files. `alive`: is called every few seconds; an exception that it raises ends the
    work.
    Raises ConfigurationError: pip failed, or a wheel that was built here holds compiled code.
    """
    downloaded, built, wanted = folder / "downloaded", folder / "built", folder / "requirements.txt"
    wanted.write_text("".join(f"{line}\n" for line in lock.requirements_for(interpreter)))
    options = [*interpreter.pip_options, "--requirement", str(wanted), "--dest", str(downloaded)]
    _pip(["download", "--no-deps", "--require-hashes", *options], lock, folder, alive)
    sources = [path for path in downloaded.iterdir() if path.suffix != ".whl"]
    if sources:
        _pip(["wheel", "--no-deps", "--wheel-dir", str(built), *map(str, sources)], lock, folder, alive)
    for wheel in built.glob("*.whl"):
        if not wheel.name.endswith("-none-any.whl"):
            raise ConfigurationError(
                f"{wheel.name} does not work with Python {interpreter.version} and glibc {interpreter.glibc} on the "
                f"supercomputer. {lock.path.name} names a package that has no wheel for them, and it was compiled on "
                "this machine. Lock a version that has wheels, or make an environment there by other means and set "
                "SLURM_PYTHON."
            )
    found = sorted([*downloaded.glob("*.whl"), *built.glob("*.whl")], key=lambda path: path.name)
    return [Wheel(path, _digest(path), path.stat().st_size) for path in found]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pip(command: list[str], lock: LockFile, folder: Path, alive: Callable[[], object]) -> None:
    """Run pip, whose temporary files are in a folder. No process of it outlives an exception."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet", *command],
        env=child_environment("PIP_", *NETWORK, TMPDIR=str(folder), **_REPRODUCIBLE),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    output = None
    with process:
        try:
            while output is None:
                try:
                    output = process.communicate(timeout=POLL_SECONDS)[0]
                except subprocess.TimeoutExpired:
                    alive()
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that build a package
            raise
    if process.returncode:
        last = "\n".join(output.strip().splitlines()[-8:])
        raise ConfigurationError(
            f"pip {command[0]} for {lock.path} failed:\n{last}\n"
            "Check the index and the proxy of pip:\n  pip config list"
        )
