"""Replace the engine of a project: the wheels in its `vendor/` folder."""

import argparse
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from packaging.version import InvalidVersion, Version

from dagster_sbatch.children import NETWORK, child_environment
from dagster_sbatch.commands import lock
from dagster_sbatch.commands.vendored import PACKAGES, SOURCES, Wheel, WheelError, build_wheel, wheels_in
from dagster_sbatch.errors import ConfigurationError

DESCRIPTION = """\
Upgrade the engine of this project: the package dagster-sbatch, whose wheel is in vendor/. The command replaces the
wheel, resolves the dependencies again, runs the project's tests, and prints what the engine's changelog asks you to
change in your own files.

If the dependencies cannot be resolved, nothing is changed. If a test fails, the new engine stays; --back returns to the
one before.
"""
EPILOG = """\
examples:
  scripts/upgrade ../template                            a clone of the template: its packages are built
  scripts/upgrade dagster_sbatch-1.1.0-py3-none-any.whl  a wheel
  scripts/upgrade https://files.example.org/dagster_sbatch-1.1.0-py3-none-any.whl
  scripts/upgrade 1.1.0                                  a version on the package index
  scripts/upgrade --back                                 the engine before the last upgrade

The certificate store of the system decides which servers are trusted.

exit codes: 0 upgraded and tested, 1 nothing was changed, 2 wrong usage, 3 upgraded, but a test fails, 130 interrupted
"""
ENGINE = PACKAGES[0]


class UpgradeError(Exception):
    """Nothing was changed; the text says why."""


def main(root: Path) -> int:
    """Run the command for the project in a folder."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="?", metavar="PATH|URL|VERSION", help="the engine to upgrade to")
    parser.add_argument("--back", action="store_true", help="return to the engine before the last upgrade")
    asked = parser.parse_args()
    if asked.back == (asked.source is not None):
        parser.error("name a path, an address or a version, or give --back")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory() as folder:
            old, new, changes = go_back(root) if asked.back else upgrade(root, asked.source, Path(folder))
    except (UpgradeError, WheelError, ConfigurationError, OSError) as error:
        print(f"{error}\nNothing was changed.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. Nothing was changed.", file=sys.stderr)
        return 130
    print(f"{ENGINE} {new} replaces {old}. Running the tests:", flush=True)
    environment = child_environment("UV_", "PIP_", "CI", "PYTEST_ADDOPTS", *NETWORK)
    tested = subprocess.run([sys.executable, str(root / "scripts" / "test")], cwd=root, env=environment, check=False)
    if changes:
        verb = "undo" if asked.back else "also make"
        print(f"\nThese changes are not made for you. In your own files, {verb} them by hand:\n\n{changes}")
    if tested.returncode:
        print("\nA test fails. Its output is above.")
        if not asked.back:
            print("Correct your code, or return to the engine before:\n  scripts/upgrade --back")
        return 3
    print("\nAll tests pass. Commit the change:\n  git add --all && git commit")
    return 0


def upgrade(root: Path, source: str, folder: Path) -> tuple[str, str, str]:
    """Replace the wheels in vendor/ by those of a source.

    Args:
        root: the project.
        source: a clone of the template, a wheel, an https address of a wheel, or a version.
        folder: an empty folder for what is built or downloaded.

    Returns:
        The versions of the engine before and after, and what the changelog says about a project's own files.

    Raises:
        UpgradeError, WheelError, ConfigurationError: nothing was changed.
    """
    old = wheels_in(root / "vendor")
    new = {name: wheel for name, wheel in find_wheels(source, folder).items() if name in old}
    if not new:
        raise UpgradeError(f"The engine of {root} is not a wheel in vendor/, so it cannot be replaced there.")
    engine = new.get(ENGINE, old[ENGINE])
    changes = changes_between(engine, old[ENGINE].version)
    with _all_or_nothing(root) as before:
        _exchange(root, old, new)
        lock.resolve(root, root / "requirements")
        previous = root / "vendor" / "previous"
        shutil.rmtree(previous, ignore_errors=True)
        shutil.copytree(before, previous)
    return old[ENGINE].version, engine.version, changes


def go_back(root: Path) -> tuple[str, str, str]:
    """Return to the wheels and the locked versions before the last upgrade; see `upgrade`."""
    old, previous = wheels_in(root / "vendor"), root / "vendor" / "previous"
    new = wheels_in(previous / "vendor")
    if not new:
        raise UpgradeError("There is no engine to return to: nothing was upgraded since the last --back.")
    changes = changes_between(old[ENGINE], new[ENGINE].version)
    with _all_or_nothing(root):
        _exchange(root, old, new)
        shutil.copytree(previous / "requirements", root / "requirements", dirs_exist_ok=True)
        lock.resolve(root, root / "requirements")
        shutil.rmtree(previous)
    return old[ENGINE].version, new[ENGINE].version, changes


def find_wheels(source: str, folder: Path) -> dict[str, Wheel]:
    """Return the wheels that a source has, by package; they are built or downloaded into a folder."""
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "packages" / ENGINE).is_dir():
            raise UpgradeError(f"{path} is not a clone of the template: it has no packages/{ENGINE}.")
        return {name: build_wheel(path / "packages" / name, folder) for name in PACKAGES}
    if path.is_file():
        wheel = Wheel(path)
        return {wheel.package: wheel}
    _download(source if source.startswith("https://") else f"{ENGINE}=={_version(source)}", folder)
    return wheels_in(folder)


def changes_between(engine: Wheel, other: str) -> str:
    """Return what the changelog of an engine says about a project's own files, from one version to the other."""
    low, high = sorted((Version(engine.version), Version(other)))
    found = []
    for section in engine.read("dagster_sbatch/CHANGELOG.md").split("\n## ")[1:]:
        version, _, text = section.partition("\n")
        own = re.search(r"^### In your own files\n(.*?)(?=^### |\Z)", text, re.MULTILINE | re.DOTALL)
        if own and low < Version(version.split()[0]) <= high:
            found.append(f"{version}\n{own[1].strip()}")
    return "\n\n".join(found)


def _version(text: str) -> Version:
    try:
        return Version(text)
    except InvalidVersion:
        raise UpgradeError(f"{text} is not a file, a folder, an address with https:// or a version.") from None


def _download(wanted: str, folder: Path) -> None:
    """Let pip download a wheel: it reads the user's configuration of package indexes, and trusts the system's store."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), wanted]
    environment = child_environment("PIP_", *NETWORK)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UpgradeError(f"{wanted} cannot be downloaded.\n{done.stderr.strip()}")


def _exchange(root: Path, old: dict[str, Wheel], new: dict[str, Wheel]) -> None:
    """Put the new wheels into vendor/, and their names into the files that name the old ones."""
    for package, wheel in new.items():
        old[package].path.unlink()
        shutil.copyfile(wheel.path, root / "vendor" / wheel.path.name)
        for name in SOURCES:
            text = (root / name).read_text()
            (root / name).write_text(text.replace(old[package].source, wheel.source))


@contextmanager
def _all_or_nothing(root: Path) -> Iterator[Path]:
    """Restore the project's wheels, locks and SOURCES if the body fails; gives a folder with the files as they were."""
    with tempfile.TemporaryDirectory() as temporary:
        before = Path(temporary) / "before"
        (before / "vendor").mkdir(parents=True)
        for wheel in wheels_in(root / "vendor").values():
            shutil.copy2(wheel.path, before / "vendor")
        shutil.copytree(root / "requirements", before / "requirements")
        for name in SOURCES:
            shutil.copy2(root / name, before)
        try:
            yield before
        except BaseException:
            for wheel in wheels_in(root / "vendor").values():
                wheel.path.unlink()
            shutil.copytree(before, root, dirs_exist_ok=True)
            raise
