"""Imports and files of a workload that are missing, on the supercomputer or everywhere, found without running it."""

import ast
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.utils import canonicalize_name

from dagster_sbatch.environments.code import ask_git, is_dotenv
from dagster_sbatch.environments.lockfile import read_lock
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.project import Project
from dagster_sbatch.run.workload import Workload, parse

_ENGINE = __name__.partition(".")[0]
_installed = cache(packages_distributions)  # names of distributions by module, on this machine
_IGNORED = "git ignores it, and only what git tracks is sent. Add it with `git add --force`, or "
_HIDEABLE = {*sys.stdlib_module_names, "dagster_pipes"} - {*sys.builtin_module_names, "test"}
"""Modules that a file of the same name in the code root hides from the programs and packages that import them."""
_CAUGHT = {"ImportError", "ModuleNotFoundError", "Exception", "BaseException"}


def find_missing(workload: Workload, project: Project, lock: Path | None) -> list[str]:
    """Return what fails on the supercomputer: in a workload, and in the modules of its code root that it imports.

    - Imports, except those that the code expects to fail (`try: ... except ImportError`) or that are for type checkers.
    - Modules that git ignores, and files that git ignores if a text in the code is the name of one.
    - Relative imports of a program, which fail everywhere.
    - A program that is a link: it imports other modules there.

    `lock`: the lock file of the packages there; None: they are not known (an image, a named interpreter).
    Returns for each: where it is, why it fails, and what to do.
    """
    roots = [workload.root] if workload.module else [workload.path.parent, workload.root]
    found: dict[str, str] = {}
    seen: set[Path] = set()
    named: dict[str, Path] = {}  # by path of a file: the program that names it
    waiting = [workload.path]
    while waiting:
        file = waiting.pop()
        if file in seen or not file.is_file():
            continue
        seen.add(file)
        with suppress(SyntaxError, ValueError, IndexError, RecursionError):  # nobody may ever import this module
            tree = parse(file)
            named.update((str(each), file) for each in _named_files(tree, file.parent))
            for line, level, module, names in _imports(tree):
                top = module.partition(".")[0]
                if level and file == workload.path and not workload.module:
                    found["."] = (
                        f"{file}, line {line}: a relative import fails in a program, because it does not run as a part "
                        "of its package. Name a folder with a __main__.py as the workload, or write the package's name."
                    )
                bases = [file.parents[level - 1]] if level else roots
                local = [each for base in bases for each in _files(base, module, names)]
                waiting += local
                if level == 0 and not local and top not in found and (reason := _reason(top, project, lock)):
                    found[top] = (
                        f"{file}, line {line}: `import {top}` works here and not on the supercomputer: {reason}"
                    )
    target = workload.path.resolve()
    if not workload.module and target.parent != workload.path.parent.resolve():
        found[""] = (
            f"{workload.path} is a link to {target}. Here, it imports modules beside that file, and on the "
            "supercomputer those beside the link. Name that file as the workload."
        )
    advice = f"works here and not on the supercomputer: {_IGNORED}import another module."
    return [
        *found.values(),
        *(f"{each} {advice}" for each in _ignored(workload.root, map(str, seen))),
        *(
            f"{named[each]} names the file {each}, which is not there on the supercomputer: {_IGNORED}"
            "keep it elsewhere, for instance below DATA_ROOT."
            for each in _ignored(workload.root, named)
        ),
    ]


def find_hidden(workload: Workload) -> list[str]:
    """Return the modules of Python itself that files beside the workload, or in the code root, hide from all imports.

    Returns for each: the file, what it hides, and what to do.
    """
    found = []
    for folder in sorted({workload.root} if workload.module else {workload.path.parent, workload.root}):
        with suppress(OSError):  # it may not be listed
            for path in sorted(folder.iterdir()):
                if path.suffix == ".py" or (path / "__init__.py").is_file():
                    found += [path] if path.stem in _HIDEABLE else []
    return [
        f"{path} hides the module `{path.stem}`: whatever imports that module gets this file, "
        "packages such as dagster_pipes included. Rename it."
        for path in found
    ]


def _imports(tree: ast.AST) -> Iterator[tuple[int, int, str, list[str]]]:
    """Yield line, level of a relative import, module, and the names imported from it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, 0, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.level, node.module or "", [alias.name for alias in node.names]
        elif isinstance(node, ast.With) and any(_catches(item.context_expr) for item in node.items):
            pass  # suppress(ImportError)
        elif isinstance(node, ast.Try) and any(_catches(handler.type) for handler in node.handlers):
            for part in (*node.handlers, *node.orelse, *node.finalbody):
                yield from _imports(part)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for part in node.orelse:
                yield from _imports(ast.Module([part], []))
        elif isinstance(node, ast.stmt | ast.excepthandler | ast.match_case):  # an expression imports nothing
            yield from _imports(node)


def _named_files(tree: ast.AST, folder: Path) -> Iterator[Path]:
    """Yield the files and folders below a folder whose names are texts in the code; dotenv files are never sent."""
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and text.isprintable() and text.strip("./") and ".." not in text and text[0] != "/":
            with suppress(OSError):  # too long for a name
                if (folder / text).exists() and not is_dotenv(Path(text).name):
                    yield folder / text


def _ignored(folder: Path, paths: Iterable[str]) -> list[str]:
    """Return those paths that git ignores."""
    return ask_git(folder, "-c", "core.quotePath=false", "check-ignore", *sorted(paths)).splitlines()


def _catches(errors: ast.expr | None) -> bool:
    return errors is None or any(isinstance(each, ast.Name) and each.id in _CAUGHT for each in ast.walk(errors))


def _files(folder: Path, module: str, names: list[str]) -> Iterator[Path]:
    """Yield the files below a folder that an import reads; none if the module is not there."""
    for name in filter(None, module.split(".")):
        folder /= name
        if folder.with_name(f"{name}.py").is_file():
            yield folder.with_name(f"{name}.py")
        elif folder.is_dir():
            yield folder / "__init__.py"
        else:
            return
    for name in names:
        if (folder / f"{name}.py").is_file():
            yield folder / f"{name}.py"
        elif (folder / name).is_dir():
            yield folder / name / "__init__.py"


def _reason(module: str, project: Project, lock: Path | None) -> str | None:
    """Return why a module cannot be imported there; None if it can, or if nothing is known about it."""
    if module in sys.stdlib_module_names:
        return None
    if module == _ENGINE:
        return "it runs beside Dagster, and is not sent. A workload needs dagster_pipes only."
    if (project.root / module).is_dir() or (project.root / f"{module}.py").is_file():
        return "it is outside the code root, and only the code root is sent. Move it into the code root."
    locked = set()
    with suppress(ConfigurationError):
        locked = {str(pin.name) for pin in read_lock(lock).pins} if lock else set()
    if not lock or not locked or canonicalize_name(module) in locked:
        return None
    bringing = [canonicalize_name(name) for name in _installed().get(module, [])]
    if not bringing or locked.intersection(bringing):
        return None
    return (
        f"the package {bringing[0]} is not in {lock.name}. "
        f"Add it to the `{lock.stem}` group of pyproject.toml and run scripts/lock."
    )
