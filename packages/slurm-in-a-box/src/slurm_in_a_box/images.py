"""The images of containers for the site's users, and its program `apptainer`.

Apptainer is not in Debian, so that its program is imitated (programs/apptainer). A real SIF file has a file system in
it; one of these has the global header of such a file, and names the folder that has the content. The /usr of that is
the machine's.
"""

import shutil
import struct
import uuid

from . import roots
from .layout import Layout
from .machines import PROGRAMS

IMAGE, REBUILT, NOT_AN_IMAGE = "debian.sif", "debian-rebuilt.sif", "notes.sif"
"""Names of files in `Layout.images`: two builds of an image, and a text."""
VARIABLES = {"PYTHONPATH": "/opt/packages", "TMPDIR": "/var/tmp", "DATA_ROOT": "/opt/data"}
"""What the %environment of the image sets, whatever they were before."""
OS_NAME = "Image of the simulated site"
"""NAME of /etc/os-release in the image."""
_SIF_HEADER = struct.Struct("<32s10s3s3s16s8q")
"""Start line, magic, version, CPU, ID, created, changed; descriptors: free, all, offset, size; data: offset, size."""
_DATA_OFFSET = 32768
_PLACES = "data dev etc home local mnt proc root run scratch sys tmp usr var/tmp"
_FROM_ROOT = "group ld.so.cache ld.so.conf nsswitch.conf passwd".split()


def make(layout: Layout) -> None:
    """Write the program and the images."""
    program = layout.state / "bin" / "apptainer"
    shutil.copy(PROGRAMS / program.name, program)
    program.chmod(0o755)
    folder, etc = layout.images / "debian", roots.root(layout.slurm) / "etc"
    for place in _PLACES.split():
        (folder / place).mkdir(parents=True)
    (folder / "tmp").chmod(0o1777)
    for link in ("bin", "sbin", "lib", "lib64"):
        (folder / link).symlink_to(f"usr/{link}")
    for name in _FROM_ROOT:
        shutil.copy(etc / name, folder / "etc")
    for name in ("hosts", "resolv.conf"):
        (folder / "etc" / name).touch()
    (folder / "etc/os-release").write_text(f'NAME="{OS_NAME}"\n', encoding="utf-8")
    environment = folder / ".singularity.d/env"
    environment.mkdir(parents=True)
    lines = [f"export {name}={value}\n" for name, value in VARIABLES.items()]
    (environment / "90-environment.sh").write_text("".join(lines), encoding="utf-8")
    for name in (IMAGE, REBUILT):
        (layout.images / name).write_bytes(_sif(f"{folder}\n".encode()))
    (layout.images / NOT_AN_IMAGE).write_text("the image is in the other folder\n", encoding="utf-8")


def _sif(data: bytes) -> bytes:
    """Return a SIF file with an ID of its own, without descriptors."""
    start, numbers = b"#!/usr/bin/env run-singularity\n", (0, 0, 48, 48, 4096, 0, _DATA_OFFSET, len(data))
    head = _SIF_HEADER.pack(start, b"SIF_MAGIC", b"01", b"00", uuid.uuid4().bytes, *numbers)
    return head.ljust(_DATA_OFFSET, b"\0") + data
