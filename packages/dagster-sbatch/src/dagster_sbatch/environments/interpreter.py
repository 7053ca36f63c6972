"""The Python interpreter on the supercomputer that an environment is made for."""

from dataclasses import dataclass

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
