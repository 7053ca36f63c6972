"""The images of containers for the site's users, and its program `apptainer`.

Apptainer is not in Debian, so that its program is imitated (programs/apptainer). A real SIF file has a file system in
it; one of these begins as such a file does, and names the folder that has the content. The /usr of that is the
machine's.
"""

import shutil

from . import roots
from .layout import Layout
from .machines import PROGRAMS

IMAGE, NOT_AN_IMAGE = "debian.sif", "notes.sif"
"""Names of files in `Layout.images`."""
OS_NAME = "Image of the simulated site"
"""NAME of /etc/os-release in the image."""
_SIF_HEAD = b"#!/usr/bin/env run-singularity\n\0SIF_MAGIC\0"
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
    (layout.images / IMAGE).write_bytes(_SIF_HEAD + f"{folder}\n".encode())
    (layout.images / NOT_AN_IMAGE).write_text("the image is in the other folder\n", encoding="utf-8")
