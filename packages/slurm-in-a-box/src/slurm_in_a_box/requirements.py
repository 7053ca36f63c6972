"""Check and install what the site needs from this machine: root, Debian or Ubuntu, and some packages."""

import os
import shutil
import subprocess
from pathlib import Path

from .errors import NotInstalledError, RequirementsError, SiteError
from .host import locked

SUPPORTED_SYSTEMS = {"debian": ("12", "13"), "ubuntu": ()}
"""Distribution ids of os-release and the versions that are accepted; an empty tuple accepts all."""

PACKAGES = (
    "debian-archive-keyring",
    "debootstrap",
    "gpgv",
    "iproute2",
    "openssh-client",
    "procps",
    "util-linux",
)
"""Packages of the host; those of the simulated machines are in roots.py."""

CACHE = Path("/var/cache/simulated-site")
"""Folder for what is built once per machine and used by every site."""


def check_system() -> None:
    """Raise RequirementsError unless this is Linux, Debian or Ubuntu, and the caller is root, with root's PATH."""
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
        raise RequirementsError("the simulated site needs Debian 12 or 13, or Ubuntu (it uses their packages)")
    if os.geteuid() != 0:
        raise RequirementsError("the simulated site needs root (it makes network, mount and process namespaces)")
    if shutil.which("pivot_root") is None:  # each Debian has it; `su` keeps the PATH of the user before
        raise RequirementsError("the simulated site needs programs that PATH lacks: add /usr/sbin, or use `su -`")
    namespaces = subprocess.run(
        ["unshare", "--mount", "--net", "--pid", "--fork", "true"], capture_output=True, check=False
    )
    if namespaces.returncode:
        raise RequirementsError(
            "the simulated site needs the right to make namespaces (in a container: a privileged one)"
        )


def missing_packages(packages: tuple[str, ...] = PACKAGES) -> list[str]:
    """Return those of the packages that are not installed."""
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
        NotInstalledError: some are not, and `install` is false.
        SiteError: apt-get failed.
    """
    missing = missing_packages()
    if not missing:
        return
    if not install:
        raise NotInstalledError(f"packages are missing: {' '.join(missing)}")
    with locked(CACHE / "lock"):
        install_packages(missing)


def install_packages(packages: list[str]) -> None:
    """Install packages of the distribution; raises SiteError."""
    apt_get("update")
    apt_get("install", "--yes", "--no-install-recommends", *packages)


def apt_get(*arguments: str) -> str:
    """Run apt-get(8) and return its output; raise SiteError with its words if it fails."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    apt = subprocess.run(
        ["apt-get", "--quiet=2", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if apt.returncode:
        raise SiteError(f"apt-get {arguments[0]} failed:\n{(apt.stdout + apt.stderr)[-3000:]}")
    return apt.stdout
