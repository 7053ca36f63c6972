"""What the simulated site needs from this machine: root, Debian or Ubuntu, and packages of the distribution."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from .errors import RequirementsError, SiteError

SUPPORTED_SYSTEMS = {"debian": ("12", "13"), "ubuntu": ()}
"""Distribution ids of os-release and the versions that are accepted; an empty tuple accepts all."""

PACKAGES = (
    "iproute2",
    "lmod",
    "mariadb-client",
    "mariadb-server",
    "munge",
    "openssh-client",
    "openssh-server",
    "procps",
    "slurm-client",
    "slurm-wlm-basic-plugins",
    "slurm-wlm-mysql-plugin",
    "slurmctld",
    "slurmd",
    "slurmdbd",
    "tcsh",
    "util-linux",
)

_POLICY = Path("/usr/sbin/policy-rc.d")


def check_system() -> None:
    """Raise RequirementsError unless this is Linux, Debian or Ubuntu, and the caller is root."""
    try:
        release = dict(
            line.split("=", 1)
            for line in Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
            if "=" in line
        )
    except OSError:
        release = {}
    system, version = (release.get(key, "").strip('"') for key in ("ID", "VERSION_ID"))
    versions = SUPPORTED_SYSTEMS.get(system)
    if versions is None or (versions and version not in versions):
        raise RequirementsError("the simulated site needs Debian 12 or 13, or Ubuntu (its Slurm packages are used)")
    if os.geteuid() != 0:
        raise RequirementsError("the simulated site needs root (it makes network, mount and process namespaces)")
    namespaces = subprocess.run(
        ["unshare", "--mount", "--net", "--pid", "--fork", "true"], capture_output=True, check=False
    )
    if namespaces.returncode:
        raise RequirementsError(
            "the simulated site needs the right to make namespaces (in a container: a privileged one)"
        )


def missing_packages(packages: tuple[str, ...] = PACKAGES) -> list[str]:
    """Return those of the packages that dpkg does not know as installed."""
    query = subprocess.run(
        ["dpkg-query", "--show", "--showformat", "${Package} ${db:Status-Status}\n", *packages],
        capture_output=True,
        text=True,
        check=False,  # it fails when it has never heard of one of them
    )
    installed = {line.split()[0] for line in query.stdout.splitlines() if line.endswith(" installed")}
    return [package for package in packages if package not in installed]


def installation_allowed(asked: bool) -> bool:
    """Packages are installed only when asked for by `--install`, or in CI (`CI=true`)."""
    return asked or os.environ.get("CI") == "true"


def ensure_packages(install: bool) -> None:
    """Make sure that PACKAGES are installed.

    Raises:
        RequirementsError: some are not, and `install` is false.
        SiteError: apt-get failed.
    """
    missing = missing_packages()
    if not missing:
        return
    if not install:
        raise RequirementsError(f"packages are missing (`scripts/sim up --install` installs them): {' '.join(missing)}")
    install_packages(missing)


def install_packages(packages: list[str]) -> None:
    """Install packages of the distribution without starting any service that they bring."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with _no_service_starts():
        for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
            apt = subprocess.run(
                ["apt-get", "--quiet=2", *command], env=environment, capture_output=True, text=True, check=False
            )
            if apt.returncode:
                raise SiteError(f"apt-get {command[0]} failed:\n{(apt.stdout + apt.stderr)[-3000:]}")


@contextlib.contextmanager
def _no_service_starts() -> Iterator[None]:
    """Have invoke-rc.d(8) refuse every start meanwhile (exit 101 of policy-rc.d), then put back what was."""
    kept = _POLICY.with_name("policy-rc.d.kept-by-simulated-site")
    if _POLICY.exists() and not kept.exists():  # a kept one is the original: an earlier installation was killed
        shutil.copy2(_POLICY, kept)
    _POLICY.unlink(missing_ok=True)
    _POLICY.write_text("#!/bin/sh\nexit 101\n", encoding="ascii")
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _POLICY.unlink()
        if kept.exists():
            kept.rename(_POLICY)
