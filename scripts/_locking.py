"""How the dependencies are resolved: the command behind `scripts/lock`."""

import sys
from pathlib import Path

FILES = {"dev.txt": ["--extra", "dev"], "cluster.txt": ["--group", "cluster"]}
OPTIONS = [
    "--universal",
    "--generate-hashes",
    "--no-strip-extras",
    "--no-header",
    "--quiet",
    "--python-version",
    "3.11",
]


def command(selection: "list[str]", output: Path) -> "list[str]":
    """Resolve, in the folder of a pyproject.toml, one of FILES into `output`, whose versions are kept if it exists."""
    group = selection[0] == "--group"  # a group is resolved by itself, without the project
    source = [] if group else ["pyproject.toml"]
    compile_into = [*source, *selection, *OPTIONS, "--output-file", str(output)]
    return [sys.executable, "-m", "uv", "pip", "compile", *compile_into, "--custom-compile-command", "scripts/lock"]
