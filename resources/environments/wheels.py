"""Wheels for the supercomputer, fetched and built here."""

import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import parse_wheel_filename

from resources.children import NETWORK, child_environment
from resources.environments.lock import Lock
from resources.environments.target import Target
from resources.errors import ConfigurationError

LOOK_SECONDS = 5.0
"""Between signs of life while pip works."""
_REPRODUCIBLE = {"SOURCE_DATE_EPOCH": "315532800"}
"""1980, where zip's time begins: the same source makes the same wheel."""


@dataclass(frozen=True)
class Wheel:
    """A wheel that lies here.

    Attributes:
        path: its file.
        digest: SHA-256 of the file.
        size: in bytes.
    """

    path: Path
    digest: str
    size: int

    @property
    def place(self) -> str:
        """Where it lies on the supercomputer, below the folder of wheels: by its content."""
        return f"{self.digest[:16]}/{self.path.name}"


def gather_wheels(lock: Lock, target: Target, folder: Path, alive: Callable[[], None]) -> list[Wheel]:
    """Fetch every wheel of a lock that an interpreter needs, and build those of which there is only source.

    Indices, proxies and credentials are those of pip's own configuration, and so is its cache. Nothing else of this
    process's environment reaches pip or the build code of packages.

    Args:
        lock: what is wanted.
        target: for whom.
        folder: empty; takes the files.
        alive: is called every few seconds; what it raises ends the work.

    Raises:
        ConfigurationError: something is not there, has another hash, does not build, or would not work on the target.
    """
    fetched, wheels, wanted = folder / "fetched", folder / "wheels", folder / "requirements.txt"
    for each in (fetched, wheels):
        each.mkdir()
    lines = [" ".join([pin.text, *(f"--hash={each}" for each in pin.hashes)]) for pin in lock.pins_for(target)]
    wanted.write_text("\n".join(lines) + "\n")
    minor = "{}.{}".format(*target.minor)
    options = ["--python-version", minor, "--implementation", "cp", "--abi", f"cp{minor.replace('.', '')}"]
    options += ["--abi", "abi3", "--abi", "none", *(f"--platform={each}" for each in target.platforms)]
    command = ["download", "--no-deps", "--require-hashes", *options, "--requirement", str(wanted), "--dest"]
    _pip([*command, str(fetched)], lock, alive)
    for path in sorted(fetched.iterdir()):
        if path.suffix == ".whl":
            path.rename(wheels / path.name)
        else:
            _pip(["wheel", "--no-deps", "--wheel-dir", str(wheels), str(path)], lock, alive)
    found = sorted(wheels.iterdir())
    _check(found, target, lock)
    return [Wheel(path, _digest(path), path.stat().st_size) for path in found]


def _check(wheels: Iterable[Path], target: Target, lock: Lock) -> None:
    """Refuse a wheel that was built here and holds compiled code for this machine."""
    works = set(target.tags)
    for wheel in wheels:
        if not parse_wheel_filename(wheel.name)[3] & works:
            raise ConfigurationError(
                f"{wheel.name} does not work with Python {target.version} and glibc {target.glibc} on the "
                f"supercomputer: take a version of which there are wheels into {lock.path.name}, or make an "
                "environment there by other means and set SLURM_PYTHON"
            )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pip(command: list[str], lock: Lock, alive: Callable[[], None]) -> None:
    """Run pip.

    Raises:
        ConfigurationError: it failed; the text is the end of what it said.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet", *command],
        env=child_environment("PIP_", *NETWORK, **_REPRODUCIBLE),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        try:
            said = _wait(process, alive)
        finally:
            process.kill()
    if process.returncode:
        last = "\n".join(said.strip().splitlines()[-8:])
        raise ConfigurationError(f"pip {command[0]} for {lock.path} failed:\n{last}")


def _wait(process: subprocess.Popen[str], alive: Callable[[], None]) -> str:
    """What it prints until it ends."""
    while True:
        try:
            return process.communicate(timeout=LOOK_SECONDS)[0]
        except subprocess.TimeoutExpired:
            alive()
