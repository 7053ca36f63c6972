"""Programs that read the dotenv files of a test's folder, and not those that a person has filled in."""

import os
import subprocess
import sys
from pathlib import Path

from resources.settings import ROOT

_PROGRAM = """\
import pathlib, runpy, sys
from resources.settings import load_settings
_, folder, *sys.argv = sys.argv
load_settings.__defaults__ = (pathlib.Path(folder), *load_settings.__defaults__[1:])
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_program(
    program: Path, *arguments: str, files: Path, variables: dict[str, str]
) -> "subprocess.CompletedProcess[str]":
    """Run a Python program with these variables alone, and with `.env` and `envs/` of the folder `files`, if any."""
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(files), str(program), *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
