"""The program that an asset names: the command that runs it, and the folder of code that it needs."""

import ast
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dagster_sbatch.errors import ConfigurationError

MAIN = "__main__.py"
LONGEST = 128 << 10  # bytes that Linux takes as one argument or one variable (MAX_ARG_STRLEN of execve(2))

UNFIT = "it has a NUL, a byte that is not UTF-8, a line end of Windows (CRLF), or 128 KiB. Use extras."
"""Why a string cannot be passed to a program: the first two by Linux, CRLF by sbatch."""


@dataclass(frozen=True)
class Workload:
    """A program or a package, with its arguments."""

    path: Path  # absolute path of the program; for a package that of its `__main__.py`
    root: Path  # the code root: the folder that is sent to the supercomputer, and from which modules are imported
    module: str | None = None  # name of the package; None for a program
    args: tuple[str, ...] = ()  # its arguments

    @property
    def relative(self) -> str:
        """The path of the program below the code root."""
        return self.path.relative_to(self.root).as_posix()

    @property
    def name(self) -> str:
        """Its name in messages."""
        return self.module or self.relative

    def command(self, root: str | Path) -> list[str]:
        """Return the program or -m and the package, and the arguments; `root`: the path of the code root there."""
        return [*(["-m", self.module] if self.module else [f"{root}/{self.relative}"]), *self.args]


def fits(value: str) -> bool:
    """Return whether a job script can pass a string to a program: no NUL, no CRLF, only UTF-8, less than 128 KiB."""
    return not re.search("[\0\ud800-\udfff]|\r\n", value) and len(value.encode()) < LONGEST


def read_workload(path: Path, args: Sequence[str], workloads: Path, *, python: bool = True) -> Workload:
    """Find out how to run a workload.

    `path`: a program, or the folder of a Python package with a `__main__.py`. `workloads`: the code root of every
    workload below it.
    Raises ConfigurationError: there is no such program, it does not parse, or the arguments are not a list of strings.
    """
    _check_arguments(args)
    given = Path(os.path.abspath(path))  # noqa: PTH100 - links are kept: what they point to is checked when code is sent
    if given.is_dir() and not python:
        raise ConfigurationError(f"the workload {given} is a folder. Name the program in it.")
    program = given / MAIN if given.is_dir() else given
    if not program.is_file():
        if given.is_dir():
            raise ConfigurationError(f"the package {given} has no {MAIN}. Add one, or name a program in the folder.")
        raise ConfigurationError(f"the workload {given} does not exist. Correct the path in `workload=`.")
    if python:
        _check_syntax(program)
    root, program = _find_root(program, workloads, package=given.is_dir())
    if not given.is_dir():
        return Workload(program, root, None, tuple(args))
    parts = program.parent.relative_to(root).parts
    if not parts or not all(part.isidentifier() for part in parts):
        raise ConfigurationError(
            f"the package {given} cannot be imported: {'.'.join(parts) or given.name!r} is not a name in Python. "
            "Rename the folder: letters, digits and underscores, and no digit first."
        )
    return Workload(program, root, ".".join(parts), tuple(args))


def _check_arguments(args: Sequence[str]) -> None:
    # A generator is read once, a set has no order, a dictionary hides its values
    if isinstance(args, str) or not isinstance(args, Sequence):
        what = "one string" if isinstance(args, str) else "not a list"
        raise ConfigurationError(f"args={args!r} is {what}. Write a list of strings, as on a command line")
    for index, each in enumerate(args):
        if not isinstance(each, str):
            raise ConfigurationError(f"args[{index}]={each!r} is not a string. Write str(...) of numbers and paths")
        if not fits(each):
            raise ConfigurationError(f"args[{index}] cannot be an argument: {UNFIT}")


_parsing = threading.Lock()


def parse(program: Path) -> ast.Module:
    """Parse a Python program; one thread at a time, because in Python 3.11 they make each other fail now and then.

    Raises SyntaxError or another error of `ast.parse`.
    """
    with _parsing:
        return ast.parse(program.read_bytes(), filename=str(program))


def _check_syntax(program: Path) -> None:
    try:
        parse(program)
    except (SyntaxError, ValueError) as error:  # ValueError: NUL bytes
        line = getattr(error, "lineno", None)
        shown = f"\n    {(getattr(error, 'text', None) or '').strip()}".rstrip()
        raise ConfigurationError(
            f"{program}{f', line {line}' if line else ''}: {getattr(error, 'msg', error)}{shown}\n"
            "This launcher runs Python programs. For another language use launcher=CommandLauncher()."
        ) from None


def _find_root(program: Path, workloads: Path, *, package: bool) -> tuple[Path, Path]:
    """Return the code root, and the program's path below it.

    The code root is `workloads` for every program below it, also if its path has links. Elsewhere it is the folder of
    the program, or the folder around the outermost package that the program belongs to.
    """
    if program.is_relative_to(workloads):
        return workloads, program
    resolved = program.parent.resolve() / program.name
    if resolved.is_relative_to(workloads.resolve()):
        return workloads, workloads / resolved.relative_to(workloads.resolve())
    root = program.parent.parent if package else program.parent
    while (root / "__init__.py").exists():
        root = root.parent
    return root, program
