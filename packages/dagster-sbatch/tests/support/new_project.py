"""A copy of the template, made once for all tests that look at it."""

import os
import subprocess
import sys
from pathlib import Path

from support import ROOT

NAME, PACKAGE = "climate-runs-of-an-alpine-valley", "climate_runs_of_an_alpine_valley"
"""As long as names may be: lines get longer with it."""
SCRIPT = str(ROOT / "scripts" / "new_project")


def plain_environment(**more: str) -> dict[str, str]:
    """PATH, HOME and what concerns package indexes; nothing of Dagster's or of git's."""
    kept = ("PATH", "HOME", "LANG", "UV_", "PIP_", "SSL_", "HTTP", "http", "NO_PROXY", "no_proxy")
    return {name: value for name, value in os.environ.items() if name.startswith(kept)} | more


def new_project(*arguments: str, folder: Path, **more: str) -> "subprocess.CompletedProcess[str]":
    """Run the command in a folder."""
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        cwd=folder,
        env=plain_environment(**more),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def made_in(folder: Path) -> Path:
    """A copy below that folder."""
    done = new_project(f"./{NAME}", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder / NAME
