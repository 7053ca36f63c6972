"""A program `apptainer` without containers, and a file that begins as an image."""

from pathlib import Path

SIF = b"#!/usr/bin/env run-singularity\n\0SIF_MAGIC\0"
_PROGRAM = """\
#!/bin/bash
# Runs the command on this machine. As apptainer, it stays as a process of its own around the command.
printf '%s\\n' "$@" >"${0%/*}/arguments"
shift
while [[ $1 == --* ]]; do case $1 in --bind | --pwd) shift 2 ;; *) shift ;; esac; done
export APPTAINER_CONTAINER=$1
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
