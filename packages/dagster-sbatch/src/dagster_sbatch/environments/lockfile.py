"""The lock file of the packages on the supercomputer: exact versions with hashes, for every platform at once."""

import hashlib
import json
from dataclasses import astuple, dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from dagster_sbatch.environments.interpreter import Interpreter
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.text_file import read_text

VERIFIED = {"dagster-pipes": "dagster_pipes", "ray": "ray"}
"""Modules that a new environment must be able to import, by the distribution that has them."""


@dataclass(frozen=True)
class Pin:
    """One line of a lock file."""

    name: str  # normalised name of the distribution
    text: str  # name, version and marker, as in PEP 508
    hashes: tuple[str, ...]  # `sha256:...` of each file that is accepted


@dataclass(frozen=True)
class LockFile:
    """A lock file's path and content."""

    path: Path
    pins: tuple[Pin, ...]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all pins; comments and their order do not count."""
        return hashlib.sha256(json.dumps(sorted(map(astuple, self.pins))).encode()).hexdigest()

    @property
    def modules(self) -> list[str]:
        """Modules that an environment with these packages must be able to import."""
        names = {pin.name for pin in self.pins}
        return [module for name, module in VERIFIED.items() if name in names]

    def requirements_for(self, interpreter: Interpreter) -> list[str]:
        """Return pip's lines for the pins whose markers hold for an interpreter.

        The lines have no markers: pip would evaluate them for the Python that it runs on.
        """
        lines = []
        for pin in self.pins:
            requirement = Requirement(pin.text)
            if requirement.marker is None or requirement.marker.evaluate(interpreter.markers):
                hashes = " ".join(f"--hash={each}" for each in pin.hashes)
                lines.append(f"{requirement.name}{requirement.specifier} {hashes}")
        return lines


def read_lock(path: Path) -> LockFile:
    """Read a lock file that scripts/lock made.

    Raises ConfigurationError: the file does not exist or cannot be read, or a line is not an exact version
    with hashes.
    """
    if not path.is_file():
        raise ConfigurationError(
            f"{path} does not exist. It locks the packages for the supercomputer. Make it:\nscripts/lock"
        )
    return _parse_all(read_text(path), path)


@lru_cache(maxsize=8)  # each run reads that of its group
def _parse_all(text: str, path: Path) -> LockFile:
    lines = text.replace("\\\n", " ").splitlines()
    pins = (_parse(line, path) for line in lines if line.strip() and not line.lstrip().startswith("#"))
    return LockFile(path, tuple(pins))


def _parse(line: str, path: Path) -> Pin:
    text, *hashes = (part.strip() for part in line.partition(" #")[0].split(" --hash="))
    try:
        requirement = Requirement(text)
        exact = [specifier.operator for specifier in requirement.specifier] == ["=="]
    except InvalidRequirement:
        exact = False
    if not (exact and hashes):
        raise ConfigurationError(
            f"{path}: {text!r} is not an exact version with hashes. If pyproject.toml names a folder or an address, "
            "put that code into the code root instead, beside the workloads. Then make the file again:\nscripts/lock"
        )
    return Pin(canonicalize_name(requirement.name), text, tuple(hashes))
