"""What a lock file says: exact versions with their hashes, for every platform at once."""

import hashlib
import json
from dataclasses import astuple, dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from resources.environments.target import Target
from resources.errors import ConfigurationError
from resources.settings import ROOT

CLUSTER = ROOT / "requirements" / "cluster.txt"
"""The locked `cluster` group."""
VERIFIED = {"dagster-pipes": "dagster_pipes", "ray": "ray"}
"""Modules that an environment must be able to import, by the requirement that brings them."""


@dataclass(frozen=True)
class Pin:
    """One requirement.

    Attributes:
        name: normalised.
        text: name, version and marker, as PEP 508 has them.
        hashes: `sha256:...` of each file that is accepted.
    """

    name: str
    text: str
    hashes: tuple[str, ...]


@dataclass(frozen=True)
class Lock:
    """The requirements of a lock file."""

    path: Path
    pins: tuple[Pin, ...]

    @cached_property
    def digest(self) -> str:
        """Of all that it demands; comments and order do not count."""
        return hashlib.sha256(json.dumps(sorted(map(astuple, self.pins))).encode()).hexdigest()

    @property
    def modules(self) -> list[str]:
        """What has to be importable in an environment that is made of it."""
        names = {pin.name for pin in self.pins}
        return [module for name, module in VERIFIED.items() if name in names]

    def pins_for(self, target: Target) -> list[Pin]:
        """Those whose markers hold there, without the markers: pip would judge them by the Python that it runs on."""
        chosen = []
        for pin in self.pins:
            requirement = Requirement(pin.text)
            if requirement.marker is None or requirement.marker.evaluate(dict(target.markers)):
                chosen.append(Pin(pin.name, f"{requirement.name}{requirement.specifier}", pin.hashes))
        return chosen


def read_lock(path: Path) -> Lock:
    """Read a lock file as scripts/lock writes it.

    Raises:
        ConfigurationError: it is not there, or a line is not an exact version with hashes.
    """
    if not path.is_file():
        raise ConfigurationError(f"{path} does not exist: make it with scripts/lock")
    return _parse_all(path.read_text(), path)


@lru_cache(maxsize=1)  # each run reads it
def _parse_all(text: str, path: Path) -> Lock:
    lines = text.replace("\\\n", " ").splitlines()
    return Lock(path, tuple(_parse(line, path) for line in lines if line.strip() and not line.lstrip().startswith("#")))


def _parse(line: str, path: Path) -> Pin:
    text, *hashes = (part.strip() for part in line.partition(" #")[0].split(" --hash="))
    try:
        requirement = Requirement(text)
    except InvalidRequirement as error:
        raise ConfigurationError(f"{path}: {line.strip()!r}: {error}") from None
    exact = [specifier.operator for specifier in requirement.specifier] == ["=="]
    if not (exact and hashes):
        raise ConfigurationError(f"{path}: {text!r} is not an exact version with hashes: run scripts/lock")
    return Pin(canonicalize_name(requirement.name), text, tuple(hashes))
