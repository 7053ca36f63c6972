"""Replace the engine of a project: the wheels in its `vendor/` folder."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from contextlib import ExitStack
from pathlib import Path

from packaging.version import Version

from dagster_sbatch.atomic_write import replacing
from dagster_sbatch.children import NETWORK, child_environment
from dagster_sbatch.commands import lock
from dagster_sbatch.commands.command_line import entry_point, make_parser
from dagster_sbatch.commands.signals import ignore_interrupts, interrupt_once
from dagster_sbatch.commands.vendored import (
    DAMAGED,
    ENGINE,
    SOURCES,
    Wheel,
    find_wheels,
    rename_wheels,
    wheels_in,
    wheels_named,
)
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.text_file import read_text, write_text

DESCRIPTION = """\
Upgrade the engine of this project: the package dagster-sbatch, whose wheel is in vendor/. The command replaces the
wheel, resolves the dependencies again, prints what the engine's changelog asks you to change in your own files, and
runs the project's tests.

If the dependencies cannot be resolved or installed, nothing is changed. If a test fails, the new engine stays; --back
returns to the one before.
"""
EPILOG = """\
examples:
  scripts/upgrade ../template                            a clone of the template: its packages are built
  scripts/upgrade dagster_sbatch-1.1.0-py3-none-any.whl  a wheel
  scripts/upgrade https://files.example.org/dagster_sbatch-1.1.0-py3-none-any.whl
  scripts/upgrade 1.1.0                                  a version on the package index of pip
  scripts/upgrade --back                                 the engine before the last upgrade

The certificate store of the system decides which servers are trusted.

exit codes: 0 upgraded and tested, 1 nothing was changed, 2 wrong usage, 3 upgraded, but a test fails or none
can run, 130 interrupted (nothing was changed, or upgraded but not tested)
"""
LOCKS = "requirements/"  # folder of the lock files. An upgrade replaces these and SOURCES, beside wheels
KEPT = "vendor/previous.zip"  # what an upgrade has replaced: SOURCES, lock files and wheels


@entry_point()
def main(root: Path) -> int:
    parser = make_parser(DESCRIPTION, EPILOG)
    parser.add_argument("source", nargs="?", metavar="PATH|URL|VERSION", help="the engine to upgrade to")
    parser.add_argument("--back", action="store_true", help="return to the engine before the last upgrade")
    asked = parser.parse_args()
    if asked.back == (asked.source is not None):
        parser.error("name a path, an address or a version, or give --back")
    interrupt_once()
    try:
        with tempfile.TemporaryDirectory() as folder:
            old, new, changes, kept = go_back(root) if asked.back else upgrade(root, asked.source, Path(folder))
    except ConfigurationError as error:
        print(f"{error}\nNothing was changed.", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error}\nIf `git status` shows changes of this command, undo them:\n{restoring(root)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. Nothing was changed.", file=sys.stderr)
        return 130
    print(f"{ENGINE} {new} replaces {old}.")
    if changes:
        verb = "undo" if (Version(new), not asked.back) < (Version(old), True) else "also make"
        print(f"\nThese changes are not made for you. In your own files, {verb} them by hand:\n\n{changes}\n")
    return _test(root, kept=kept)


def _test(root: Path, *, kept: bool) -> int:
    """Install the engine and run the project's tests; return the exit code.

    If the engine cannot be installed, no script can start, so --back neither: this puts back the one before, if kept.
    """
    interrupt_once()
    sys.stdout.flush()
    try:
        if kept and run_script(root, "upgrade", "--help"):
            go_back(root)
            print(f"\n{ENGINE} cannot be installed; the reason is above.\nNothing was changed.", file=sys.stderr)
            return 1
        print("Running the tests:", flush=True)
        failed = run_script(root, "test")
    except (KeyboardInterrupt, OSError) as error:
        stopped = isinstance(error, KeyboardInterrupt)
        reason = "Interrupted" if stopped else error
        print(f"\n{reason}. The engine is replaced, but not tested. Run the tests:\n  scripts/test", file=sys.stderr)
        return 130 if stopped else 3
    if failed:
        print("\nA test fails. Its output is above.")
        if kept:
            print("Correct your code, or go back to the former engine:\n  scripts/upgrade --back")
        return 3
    print("\nAll tests pass. Commit the change:\n  git add --all && git commit")
    return 0


def run_script(root: Path, name: str, *options: str) -> int:
    """Run a script of a project, which installs the engine first; return its exit code. With options, only errors show.

    pixi has to install that engine itself: within its environment a script does not set anything up.
    """
    command = [sys.executable, str(root / "scripts" / name)]
    if (root / ".pixi" / "envs").resolve() in Path(sys.prefix).resolve().parents:
        command = ["pixi", "run", "--manifest-path", str(root / "pixi.toml"), "python", command[1]]
    environment = child_environment("UV_", "PIP_", "CI", "PYTEST_ADDOPTS", *NETWORK)
    output = subprocess.DEVNULL if options else None
    with subprocess.Popen([*command, *options], cwd=root, env=environment, stdout=output) as script:
        try:
            return script.wait()
        except KeyboardInterrupt as interrupt:
            if interrupt.args == (signal.SIGTERM,):
                script.terminate()  # the terminal sends Ctrl-C to the script, too
            script.wait()
            raise


def upgrade(root: Path, source: str, folder: Path) -> tuple[str, str, str, bool]:
    """Replace the wheels in vendor/ by those of a source.

    `source`: a clone of the template, a wheel, an https address of a wheel, or a version. `folder`: an empty folder for
    what is built or downloaded.
    Returns the versions of the engine before and after, what the changelog says about a project's own files, and
    whether the engine before is kept for `go_back`.
    Raises ConfigurationError: nothing was changed.
    """
    old, texts = _wheels_of(root), _texts(root)
    for name, text in texts.items():
        named = wheels_named(root, name)
        other = name == "requirements/dev.txt" and any(
            old[each].requirement not in text for each in old if each in named
        )
        if other or old != {**old, **named}:
            raise ConfigurationError(
                f"pyproject.toml and {name} name different wheels: an upgrade was interrupted. "
                f"Return to the engine before it:\n  scripts/upgrade --back\nor to your last commit:\n{restoring(root)}"
            )
    new = {name: wheel for name, wheel in find_wheels(source, folder).items() if name in old}
    if not new:
        raise ConfigurationError(f"{source} has no wheel of {' or '.join(old)}.")
    for wheel in new.values():
        wheel.read(f"{wheel.distribution}-{wheel.version}.dist-info/METADATA")  # the file may have been renamed
    engine = new.get(ENGINE, old[ENGINE])
    changes = changes_between(old[ENGINE], engine)
    files = _resolved(root, new, texts)
    same = all(wheel.requirement == old[name].requirement for name, wheel in new.items())
    ignore_interrupts()
    _refuse_other_texts(root, texts)
    _replace(root, new, files, kept=None if same else old)  # the same again is nothing to return to
    return old[ENGINE].version, engine.version, changes, not same


def go_back(root: Path) -> tuple[str, str, str, bool]:
    """Return to the wheels and the locked versions before the last upgrade; see `upgrade`.

    Without a network, unless pyproject.toml has changed since.
    """
    old, texts, kept = _wheels_of(root), _texts(root), root / KEPT
    if not kept.exists():
        raise ConfigurationError("There is no engine to return to: nothing was upgraded since the last --back.")
    with tempfile.TemporaryDirectory() as temporary:
        try:
            with zipfile.ZipFile(kept) as archive:
                archive.extractall(temporary)
        except DAMAGED as error:
            raise ConfigurationError(
                f"{KEPT} cannot be read: {error}. Return to the commit before the last upgrade instead:\n"
                f"{restoring(root, '--source COMMIT ')}"
            ) from None
        new, before = wheels_in(Path(temporary, "vendor")), _texts(Path(temporary))
        changes = changes_between(new[ENGINE], old[ENGINE])
        files = {name: text for name, text in before.items() if name.startswith(LOCKS)}
        files |= {name: rename_wheels(text, new) for name, text in texts.items() if name in SOURCES}
        if files["pyproject.toml"] != before["pyproject.toml"]:
            files = _resolved(root, new, files)
        ignore_interrupts()
        _refuse_other_texts(root, texts)
        _replace(root, new, files, kept=None)
    kept.unlink()
    return old[ENGINE].version, new[ENGINE].version, changes, False


def restoring(root: Path, options: str = "") -> str:
    """Return the command that restores what an upgrade replaces. git restores nothing if it does not know a name."""
    names = " ".join(name for name in SOURCES if (root / name).exists())
    return f"  git restore {options}vendor requirements {names}"


def changes_between(one: Wheel, other: Wheel) -> str:
    """Return what the newer of two engines asks to change in a project's own files, and the older one does not.

    Of two builds of the same version, `other` is the newer one.
    """
    older, newer = sorted((one, other), key=lambda each: Version(each.version))
    known = set().union(*_own_changes(older).values())
    found = {version: [each for each in all_ if each not in known] for version, all_ in _own_changes(newer).items()}
    return "\n\n".join("\n".join([version, *changes]) for version, changes in found.items() if changes)


def _own_changes(engine: Wheel) -> dict[str, list[str]]:
    """Return what the changelog of an engine asks to change in a project's own files, by version."""
    sections = (each.partition("\n") for each in engine.read("dagster_sbatch/CHANGELOG.md").split("\n## ")[1:])
    own = re.compile(r"^### In your own files\n(.*?)(?=^### |\Z)", re.MULTILINE | re.DOTALL)
    return {
        version: re.split(r"\n(?=- )", found[1].strip()) for version, _, text in sections if (found := own.search(text))
    }


def _wheels_of(root: Path) -> dict[str, Wheel]:
    """Return the project's wheels, by package, the engine among them."""
    wheels = wheels_named(root, "pyproject.toml")
    if ENGINE not in wheels:
        raise ConfigurationError(
            f"pyproject.toml names no wheel of {ENGINE} in vendor/, so the engine comes from a package index. "
            "Ask for another version in pyproject.toml, then run:\n  scripts/lock"
        )
    for wheel in wheels.values():
        if not wheel.path.is_file():
            raise ConfigurationError(
                f"pyproject.toml names {wheel.source}, which is missing. Restore it:\n{restoring(root)}"
            )
    return wheels


def _texts(root: Path) -> dict[str, str]:
    """Return the texts of those SOURCES and lock files that a project has, by name."""
    names = (*SOURCES, *(f"{LOCKS}{name}" for name in lock.locked_files(root)))
    return {name: read_text(root / name) for name in names if (root / name).exists()}


def _refuse_other_texts(root: Path, texts: dict[str, str]) -> None:
    """Raise ConfigurationError if what `_texts` returns is no longer these: a person or a command has written it."""
    now = _texts(root)
    changed = [name for name in sorted({**texts, **now}) if texts.get(name) != now.get(name)]
    if changed:
        raise ConfigurationError(f"{' and '.join(changed)} changed while this command ran. Run it again.")


def _resolved(root: Path, wheels: dict[str, Wheel], files: dict[str, str]) -> dict[str, str]:
    """Resolve the dependencies with these wheels and files, in a copy of the project; return their texts there."""
    beside = root.parent if os.access(root.parent, os.W_OK) else None  # from there, `../wheels` is the same folder
    with tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=beside) as temporary:
        copy = Path(temporary)
        for path in root.iterdir():
            if path.name not in {"vendor", "requirements", *SOURCES}:
                (copy / path.name).symlink_to(path)
        for path in (*root.glob("vendor/*.whl"), *root.glob("requirements/*.txt")):
            (copy / path.parent.name).mkdir(exist_ok=True)  # its mode and that of the file may be read-only
            shutil.copyfile(path, copy / path.parent.name / path.name)
        for wheel in wheels.values():
            shutil.copyfile(wheel.path, copy / "vendor" / wheel.path.name)
        for name, text in files.items():
            write_text(copy / name, text if name.startswith(LOCKS) else rename_wheels(text, wheels))
        return _texts(copy) | {f"{LOCKS}{path.name}": text for path, text in lock.resolve(copy).items()}


def _replace(root: Path, wheels: dict[str, Wheel], files: dict[str, str], kept: dict[str, Wheel] | None) -> None:
    """Replace wheels, SOURCES and lock files of a project.

    After a crash at any moment, the wheels that its files name are there.

    `files`: the new texts of SOURCES and lock files, by name. `kept`: the wheels of the project, to be kept with these
    files in KEPT, if it is not the source.
    """
    vendor = root / "vendor"
    contents = {root / name: text.encode() for name, text in files.items()}
    contents |= {vendor / wheel.path.name: wheel.path.read_bytes() for wheel in wheels.values()}
    with ExitStack() as replaced:  # the last one first: the wheels
        for path, content in contents.items():
            file = replaced.enter_context(replacing(path))
            file.write(content)
            file.flush()
        if kept is not None:
            with replacing(root / KEPT) as file, zipfile.ZipFile(file, "w", strict_timestamps=False) as archive:
                for path in [root / name for name in _texts(root)] + [wheel.path for wheel in kept.values()]:
                    archive.write(path, path.relative_to(root))
    for wheel in wheels.values():
        for path in vendor.glob(f"*{wheel.distribution}-*"):  # also what a killed upgrade has left
            if path.name != wheel.path.name:
                path.unlink()
