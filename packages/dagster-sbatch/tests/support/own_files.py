"""Programs that read the dotenv files of a test's folder, and not those that a person has filled in."""

import os
import subprocess
import sys
from pathlib import Path

from support import ROOT

_PROGRAM = """\
import pathlib, runpy, sys
from dagster_sbatch import project
from dagster_sbatch.setting_files import load_settings
folder, *sys.argv = sys.argv[1:]
project.load_settings = lambda sites, _, supercomputer=False: load_settings(sites, pathlib.Path(folder), supercomputer)
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
