"""Resolve the dependencies in pyproject.toml to exact versions with hashes: requirements/*.txt.

dev.txt is the project with its `dev` extra, for this machine; cluster.txt the `cluster` group, for the supercomputer.
Without an option, only what pyproject.toml demands is changed.

exit codes: 0 done, or current; 1 --check found a file that is not current (the difference is printed); 2 wrong usage
"""

import argparse
import difflib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from dagster_sbatch.children import NETWORK, child_environment
from dagster_sbatch.project import Project

FILES = {"dev.txt": ["--extra", "dev"], "cluster.txt": ["--group", "cluster"]}
OPTIONS = [
    "--universal",
    "--generate-hashes",
    "--no-strip-extras",
    "--no-header",
    "--quiet",
    "--python-version",
    "3.11",
    "--no-emit-package",
    "dagster-sbatch",
    "--no-emit-package",
    "slurm-in-a-box",
]


def main(project: Project) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions")
    parser.add_argument("--check", action="store_true", help="change nothing, say what is not current")
    asked = parser.parse_args()
    folder = project.root / "requirements"
    stale = False
    with tempfile.TemporaryDirectory() as made:
        for name, selection in FILES.items():
            new, old = Path(made) / name, folder / name
            if old.exists() and not asked.upgrade:
                shutil.copyfile(old, new)  # uv keeps the versions that it finds in its output file
            resolve(project, selection, new)
            if not asked.check:
                shutil.copyfile(new, old)
            elif new.read_text() != old.read_text():
                stale = True
                changes = difflib.unified_diff(
                    old.read_text().splitlines(), new.read_text().splitlines(), str(old), "wanted", n=0
                )
                print("\n".join(changes))
    if stale:
        print("requirements/ is not what pyproject.toml asks for: run scripts/lock")
    return int(stale)


def resolve(project: Project, selection: "list[str]", output: Path) -> None:
    command = resolution(selection, output)
    environment = child_environment("UV_", *NETWORK)
    subprocess.run(command, cwd=project.root, env=environment, check=True, stdout=subprocess.DEVNULL)


def resolution(selection: "list[str]", output: Path) -> "list[str]":
    """Resolve, in the folder of a pyproject.toml, one of FILES into `output`, whose versions are kept if it exists."""
    group = selection[0] == "--group"  # a group is resolved by itself, without the project
    source = [] if group else ["pyproject.toml"]
    compile_into = [*source, *selection, *OPTIONS, "--output-file", str(output)]
    return [sys.executable, "-m", "uv", "pip", "compile", *compile_into, "--custom-compile-command", "scripts/lock"]
