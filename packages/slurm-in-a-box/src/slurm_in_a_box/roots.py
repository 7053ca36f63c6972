"""The file systems of the site's machines: Debian with Slurm, made by debootstrap(8) and kept for every site.

A machine has the /usr of such a root and a copy of its /etc: the host's distribution and packages do not matter to it.
"""

import os
import shutil
import subprocess
import tempfile
import zlib
from pathlib import Path

from .errors import NotInstalledError, SiteError
from .host import locked
from .requirements import CACHE, apt_get

SUITES = {"22.05": "bookworm", "24.11": "trixie"}
"""Versions of Slurm that a site can have, and the release of Debian whose packages they are."""

_PACKAGES = (
    "charliecloud-runtime",
    "iproute2",
    "lmod",
    "mariadb-server",
    "munge",
    "openssh-server",
    "procps",
    "python3",
    "slurm-client",
    "slurm-wlm-basic-plugins",
    "slurm-wlm-mysql-plugin",
    "slurmctld",
    "slurmd",
    "slurmdbd",
    "tcsh",
)
_KEPT = ("etc", "usr")
_PLACES = ("usr/bin/apptainer", "usr/bin/nvidia-smi")
"""Empty files: machines mount the site's own programs on them."""


def chosen() -> str:
    """Version of Slurm of a new site: $SIMULATED_SITE_SLURM, or the newest.

    Raises:
        SiteError: there is no such version.
    """
    slurm = os.environ.get("SIMULATED_SITE_SLURM", max(SUITES))
    if slurm not in SUITES:
        raise SiteError(f"SIMULATED_SITE_SLURM: no such version of Slurm: {slurm}; there are {', '.join(SUITES)}")
    return slurm


def root(slurm: str) -> Path:
    """Folder of the root with that version of Slurm; other packages or places make another one."""
    return CACHE / f"slurm-{slurm}-{zlib.crc32(' '.join(_PACKAGES + _PLACES).encode()):08x}"


def ensure(slurm: str, install: bool) -> None:
    """Make the root with that version of Slurm unless it is there (a minute or two, once per machine).

    Raises:
        NotInstalledError: it is not there, and `install` is false.
        SiteError: debootstrap failed.
    """
    if not root(slurm).exists():
        if not install:
            raise NotInstalledError(f"the file system of the machines with Slurm {slurm} is missing")
        with locked(CACHE / "lock"):
            if not root(slurm).exists():
                with tempfile.TemporaryDirectory(prefix="root-", dir=CACHE) as folder:
                    _make(SUITES[slurm], Path(folder))
                    Path(folder, "kept").rename(root(slurm))


def _make(suite: str, folder: Path) -> None:
    """Make a root in `folder`/all, and leave what machines take of it in `folder`/kept."""
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(_PACKAGES)}", suite, str(folder / "all")]
    done = subprocess.run(
        [*command, *_mirror()], env={**os.environ, **_proxy()}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SiteError(f"debootstrap of {suite} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    (folder / "kept").mkdir()
    for name in _KEPT:
        (folder / "all" / name).rename(folder / "kept" / name)
    shutil.rmtree(folder / "kept/usr/share/doc")
    for place in _PLACES:
        (folder / "kept" / place).touch(mode=0o755)


def _mirror() -> list[str]:
    """Address of the machine's own mirror of Debian; nothing where it has none, as Ubuntu: debootstrap knows one."""
    apt_get("update")  # what a mirror has is in its lists
    listing = apt_get("indextargets", "--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages")
    return [line.removeprefix("Debian ") for line in listing.splitlines() if line.startswith("Debian ")][:1]


def _proxy() -> dict[str, str]:
    """The proxy of apt as wget, which debootstrap calls, takes it."""
    found = {}
    for scheme in ("http", "https"):
        ask = ["apt-config", "--format", "%v", "dump", f"Acquire::{scheme}::Proxy"]
        if value := subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip():
            found[f"{scheme}_proxy"] = value
    return found
