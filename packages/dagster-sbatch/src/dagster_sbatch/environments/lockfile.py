"""The packages on the supercomputer: a lock file for every platform at once, and the interpreter that they are for."""

import hashlib
import json
from dataclasses import astuple, dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.text_file import read_text

VERIFIED = {"dagster-pipes": "dagster_pipes", "ray": "ray"}
"""Modules that a new environment must be able to import, by the distribution that has them."""
OLDEST, NEWEST = (3, 11), (3, 13)  # versions that the lock file is resolved for: `requires-python` of pyproject.toml
OLDEST_MANYLINUX = 17
"""Minor version of the oldest glibc whose wheels are named `manylinux_2_N`; pip knows the names of older ones."""


@dataclass(frozen=True)
class Interpreter:
    """A CPython on the supercomputer, as it described itself on the login node."""

    executable: str  # absolute path, with links resolved
    version: str  # such as `3.11.9`
    machine: str  # such as `x86_64`
    glibc: str  # such as `2.28`

    @property
    def minor(self) -> str:
        """Such as `3.11`."""
        return ".".join(self.version.split(".")[:2])

    @property
    def pip_options(self) -> list[str]:
        """Options with which `pip download` selects wheels for this interpreter.

        The platforms are those of PEP 600, the newest glibc first. `linux_...` is not among them: such a wheel may need
        libraries of the machine that it was built on.
        """
        glibc = int(self.glibc.split(".")[1])
        platforms = [f"manylinux_2_{minor}" for minor in range(glibc, OLDEST_MANYLINUX - 1, -1)] + ["manylinux2014"]
        options = [f"--platform={each}_{self.machine}" for each in platforms]
        abi = f"cp{self.minor.replace('.', '')}"
        return ["--python-version", self.minor, "--implementation", "cp", "--abi", abi, *options]

    @property
    def markers(self) -> dict[str, str]:
        """Values of the environment markers (PEP 508)."""
        return {
            "python_version": self.minor,
            "python_full_version": self.version,
            "implementation_version": self.version,
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "os_name": "posix",
            "sys_platform": "linux",
            "platform_system": "Linux",
            "platform_machine": self.machine,
        }


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
