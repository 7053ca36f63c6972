"""Commands on the host."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from .errors import SiteError


def run_on_host(*command: str) -> str:
    """Run a command on the host and return its output; raise SiteError with its words if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SiteError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def ip(*arguments: str) -> str:
    """Run ip(8) on the host and return its output; raises SiteError."""
    return run_on_host("ip", *arguments)


def spawn(command: Sequence[str], log: Path) -> None:
    """Start a process that outlives this one and belongs to no terminal; what it prints is appended to `log`."""
    with log.open("ab") as output:
        subprocess.run(
            ["setsid", "--fork", *command], stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=True
        )
