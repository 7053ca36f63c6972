"""A program `apptainer` without containers, and files that begin as an image."""

import struct
from pathlib import Path


def sif(build: int = 1, data: int = 4096) -> bytes:
    """Return a SIF file; `build`: 0 for one that is to be reproducible, another number for its ID; `data`: bytes."""
    numbers = build, build, 47, 48, 128, 585, 4096, data
    head = struct.pack("<32s10s3s3s16s8q", b"#!/usr/bin/env run-singularity\n", b"SIF_MAGIC", b"01", b"02",
                       build.to_bytes(16, "big"), *numbers)  # fmt: skip
    return head.ljust(4096 + data, b"\0")


SIF = sif()
_PROGRAM = """\
#!/bin/bash
# Runs the command on this machine. As apptainer, it stays as a process of its own around the command, and the image
# sets variables.
printf '%s\\n' "$@" >"${0%/*}/arguments"
shift
while [[ $1 == --* ]]; do case $1 in --bind | --pwd) shift 2 ;; *) shift ;; esac; done
export APPTAINER_CONTAINER=$1 PYTHONPATH=/of/the/image DATA_ROOT=/of/the/image TMPDIR=/of/the/image COLOUR=image
shift
"$@" &
wait $!
"""


def put_apptainer(folder: Path) -> Path:
    """Write the program into a folder, unless it is there; return the folder. It writes its arguments beside itself."""
    folder.mkdir(exist_ok=True)
    program = folder / "apptainer"
    if not program.exists():
        program.write_text(_PROGRAM)
        program.chmod(0o755)
    return folder
