"""The Python that an environment is made for, as it has described itself on the login node."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from packaging.tags import Tag, compatible_tags, cpython_tags

OLDEST, NEWEST = (3, 11), (3, 13)
"""Versions that the lock is made for: `requires-python` of pyproject.toml."""
OLDEST_GLIBC = 5
"""Minor version; wheels for older ones have names of their own."""


@dataclass(frozen=True)
class Target:
    """An interpreter on the supercomputer.

    Attributes:
        executable: absolute path, without links.
        version: such as `3.11.9`.
        machine: such as `x86_64`.
        glibc: such as `2.28`.
    """

    executable: str
    version: str
    machine: str
    glibc: str

    @property
    def minor(self) -> tuple[int, int]:
        """Such as (3, 11)."""
        first, second, *_ = self.version.split(".")
        return int(first), int(second)

    @property
    def platforms(self) -> list[str]:
        """Of wheels that work there, the best first (PEP 600). Not `linux_...`: what was compiled here is for here."""
        newest = int(self.glibc.split(".")[1])
        names = [f"manylinux_2_{minor}" for minor in range(newest, OLDEST_GLIBC - 1, -1)]
        old = {"manylinux2014": 17, "manylinux2010": 12, "manylinux1": 5}
        names += [name for name, minor in old.items() if minor <= newest]
        return [f"{name}_{self.machine}" for name in names]

    @property
    def tags(self) -> Iterator[Tag]:
        """Of wheels that work there (PEP 425)."""
        yield from cpython_tags(self.minor, platforms=self.platforms)
        yield from compatible_tags(self.minor, f"cp{self.minor[0]}{self.minor[1]}", self.platforms)

    @property
    def markers(self) -> Mapping[str, str]:
        """Values of the environment markers (PEP 508)."""
        return {
            "python_version": "{}.{}".format(*self.minor),
            "python_full_version": self.version,
            "implementation_version": self.version,
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "os_name": "posix",
            "sys_platform": "linux",
            "platform_system": "Linux",
            "platform_machine": self.machine,
        }
