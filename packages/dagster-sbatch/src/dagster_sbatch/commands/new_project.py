"""Make a project of your own from this template, without the example."""

import importlib.metadata
import keyword
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from dagster_sbatch.commands import lock, project_copy
from dagster_sbatch.commands.command_line import make_parser
from dagster_sbatch.commands.signals import interrupt_once
from dagster_sbatch.commands.vendored import PACKAGES
from dagster_sbatch.environments.code import ask_git
from dagster_sbatch.errors import ConfigurationError, nearest
from dagster_sbatch.project import Project
from dagster_sbatch.text_file import read_text

DESCRIPTION = """\
Make a project of your own from this template: a copy of what git tracks here, with your name in place of the
template's, and with one small asset, its workload and its tests in place of the example. The engine is a wheel in
vendor/, the dependencies are locked, and a git history begins. No network is needed.

NAME may be a dot, in a clone of the repository that a forge has made for you from this template: then the clone itself
becomes the project, in one commit. After a failure or Ctrl-C, nothing of the new project remains. If the command is
killed (kill -9), a hidden folder .NAME.PID remains beside the project's place, or one in the temporary folder: remove
it.
"""
EPILOG = """\
examples:
  scripts/new_project climate-runs             beside this repository
  scripts/new_project ~/projects/climate-runs  there
  scripts/new_project .                        here, with the name of this folder

exit codes: 0 made, 1 it could not be made (all reasons are printed), 2 wrong usage, 130 interrupted
"""
MODULES = sys.stdlib_module_names | {"test"}  # Python's list lacks this one
LONGEST_NAME = 32  # lines with it must not become too long
NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")


def main(project: Project, left_out: Sequence[str]) -> int:
    """Run the command; see `Template` for `left_out`."""
    parser = make_parser(DESCRIPTION, EPILOG)
    parser.add_argument(
        "name", metavar="NAME", help="name of the project, for instance climate-runs; or a path to it; or a dot"
    )
    parser.add_argument(
        "--site",
        default="musica",
        help="name of the supercomputer, for whose settings the project gets a dotenv file (default: musica)",
    )
    asked = parser.parse_args()
    root, path = project.root, Path(asked.name).expanduser()
    target = path.absolute() if os.sep in asked.name or asked.name in (".", "..") else root.parent / path
    in_place = target.resolve() == root
    name = root.name if in_place else path.name
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    interrupt_once()
    template, project_name = project_copy.Template(root, left_out), name.replace("_", "-")
    try:
        problems = find_problems(project, name, target, asked.site, in_place=in_place)
        if problems:
            console.print("\n".join(f"- {problem}" for problem in problems))
            return 1
        make = project_copy.convert if in_place else partial(project_copy.make_copy, target)
        make(template, project_name, asked.site, lambda text: console.print(f"{text} ..."))
    except ConfigurationError as error:
        console.print(f"{error}\nNothing was made.")
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted; nothing was made.")
        return 130
    console.print(
        f"{target.resolve()} is made. Next:\n"
        f"  cd {shlex.quote(str(target.resolve()))}\n"
        "  scripts/demo\n"
        "  scripts/test\n"
        "  scripts/dev                   then materialise pi_estimate\n"
        f"and for the supercomputer fill in envs/.env.{asked.site}, which git does not track."
    )
    return 0


def find_problems(project: Project, name: str, target: Path, site: str, *, in_place: bool) -> list[str]:
    """Return why the project cannot be made; empty if it can."""
    named = name_problems(project.root, name, in_place=in_place)
    if named and in_place:
        named.append(f"a project that is made in place has the name of its folder: rename {project.root}")
    history = git_problems(project.root) or ([] if named else ignored_problems(project.root, name))
    return named + history + ([] if in_place else place_problems(project.root, target)) + site_problems(project, site)


def name_problems(root: Path, name: str, *, in_place: bool) -> list[str]:
    """Return why this cannot be the name of a Python package and of a project; empty if it can."""
    if len(name) > LONGEST_NAME or not NAME.fullmatch(name):
        return [
            f"the name {name!r} cannot be used. Use up to {LONGEST_NAME} small letters and digits, a letter first, "
            "with - or _ between words, for instance climate-runs"
        ]
    package = name.replace("-", "_")
    if keyword.iskeyword(package) or package in MODULES:
        return [f"the name {name!r} is a keyword or a module of Python. Choose another name"]
    taken = names_in_use(root) - ({project_copy.OLD_PACKAGE, project_copy.OLD_PROJECT} if in_place else set())
    if {package, name, name.replace("_", "-")} & taken:
        return [f"the name {name!r} is taken by a folder or a package that the project uses. Choose another name"]
    return []


def names_in_use(root: Path) -> set[str]:
    """Return the names that a project cannot have: of folders, of modules and of locked packages."""
    workloads = root / project_copy.SKELETON / project_copy.OLD_PACKAGE / "workloads"
    folders = {path.name for path in root.iterdir()} | {"vendor"}
    modules = {path.stem for path in workloads.iterdir()} | set(importlib.metadata.packages_distributions())
    locked = {entry.name for file in (root / "requirements").glob("*.txt") for entry in lock.parse(read_text(file))}
    return folders | modules | locked | set(PACKAGES)


def ignored_problems(root: Path, name: str) -> list[str]:
    """Return that git would ignore the folder of the project's package; empty if it would not."""
    package = name.replace("-", "_")
    rule = ask_git(root, "check-ignore", "--verbose", "--no-index", f"{package}/").split("\t")[0]
    text = f"the name {name!r} cannot be used: git ignores a folder {package} ({rule}). Choose another name"
    return [text] if rule else []


def git_problems(root: Path) -> list[str]:
    """Return why git cannot list the files of the template; empty if it can."""
    if shutil.which("git") is None:
        return ["git is not installed"]
    if not (root / ".git").exists():
        return [f"{root} is not a git checkout, so what belongs to it is not known: clone the template with git"]
    return []


def place_problems(root: Path, target: Path) -> list[str]:
    """Return why the copy cannot be made there; empty if it can."""
    problems = []
    if os.path.lexists(target):
        problems.append(f"{target} exists already. Choose another name, or move it away")
    elif not target.parent.is_dir():
        problems.append(f"there is no folder {target.parent}: mkdir -p {shlex.quote(str(target.parent))}")
    elif not os.access(target.parent, os.W_OK):
        problems.append(f"you may not make a folder in {target.parent}: name another place, like ~/{target.name}")
    if target.resolve().is_relative_to(root):
        problems.append(f"{target} would lie within the template: name a place outside of {root}")
    return problems


def site_problems(project: Project, site: str) -> list[str]:
    """Return why the project cannot have a dotenv file of that site; empty if it can."""
    if site not in project.site_overrides:
        known = nearest(site, project.site_overrides)
        return [f"--site {site!r} is not a known site{known}\n  `scripts/docs another-site` shows how to add one"]
    example = f"envs/.env.{site}.example"
    if not (project.root / example).is_file():
        return [f"there is no {example} to begin envs/.env.{site} with: write one"]
    if not git_problems(project.root) and not project_copy.git(project.root, "ls-files", example):
        return [f"git does not track {example}, so the project would not have it. Add it:\n  git add {example}"]
    return []
