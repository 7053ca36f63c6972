"""Wheels in a project's `vendor/` folder: build or download them, read them, name them in the project's files."""

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from packaging.version import InvalidVersion, Version

from dagster_sbatch.children import NETWORK, child_environment
from dagster_sbatch.errors import ConfigurationError
from dagster_sbatch.text_file import read_text

PACKAGES = ("dagster-sbatch", "slurm-in-a-box")  # what a project takes from this repository; each lies in `packages/`
ENGINE = PACKAGES[0]
SOURCES = ("pyproject.toml", "pixi.toml")  # the files of a project that name its wheels by path
NAME_OF_WHEEL = re.compile(
    rf"\./vendor/((?:{'|'.join(name.replace('-', '_') for name in PACKAGES)})-[^-/\s\"']+-py3-none-any\.whl)"
)
"""How a file of a project names one of its wheels."""
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError)  # what zipfile raises for a damaged archive


@dataclass(frozen=True)
class Wheel:
    """A wheel of one of PACKAGES."""

    path: Path

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w+-[^-]+-py3-none-any\.whl", self.path.name) or self.package not in PACKAGES:
            raise ConfigurationError(f"{self.path.name} is not a wheel of {' or '.join(PACKAGES)}.")

    @property
    def distribution(self) -> str:
        """The package's name as file names have it."""
        return self.path.name.split("-")[0]

    @property
    def package(self) -> str:
        """The package's name as requirements have it."""
        return self.distribution.replace("_", "-")

    @property
    def version(self) -> str:
        """The package's version."""
        return self.path.name.split("-")[1]

    @property
    def source(self) -> str:
        """The path that the project's files name it by."""
        return f"./vendor/{self.path.name}"

    @property
    def requirement(self) -> str:
        """The lines of a lock file, as uv writes them."""
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        return f"{self.source} \\\n    --hash=sha256:{digest}"

    def read(self, member: str) -> str:
        """Return the text of a file in the wheel.

        Raises ConfigurationError: the file is not a wheel, or has no such member.
        """
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(member).decode()
        except KeyError:
            raise ConfigurationError(
                f"{self.path.name} has no {member}: it is another package's, or was renamed."
            ) from None
        except DAMAGED as error:
            raise ConfigurationError(f"{self.path.name} cannot be read: {error}") from None


def build_wheel(source: Path, folder: Path) -> Wheel:
    """Build the wheel of a package, without a network: hatchling is part of the project's environment.

    The same sources give the same bytes.
    Raises ConfigurationError: hatchling failed.
    """
    with tempfile.TemporaryDirectory() as made:
        command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", made]
        done = subprocess.run(command, cwd=source, env=child_environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigurationError(f"The wheel of {source} cannot be built.\n{done.stdout}{done.stderr}".strip())
        (path,) = Path(made).glob("*.whl")
        return Wheel(Path(shutil.copy(path, folder)))


def find_wheels(source: str, folder: Path) -> dict[str, Wheel]:
    """Return the wheels that a source has, by package; they are built or downloaded into a folder."""
    path = Path(source).expanduser()
    if path.is_dir():
        sources = {name: path / "packages" / name for name in PACKAGES}
        found = {name: source for name, source in sources.items() if (source / "pyproject.toml").is_file()}
        if ENGINE not in found:
            raise ConfigurationError(f"{path} is not a clone of the template: it has no packages/{ENGINE}.")
        return {name: build_wheel(source, folder) for name, source in found.items()}
    if path.is_file():
        wheel = Wheel(path)
        return {wheel.package: wheel}
    try:
        _download(source if source.startswith("https://") else f"{ENGINE}=={Version(source)}", folder)
    except InvalidVersion:
        raise ConfigurationError(f"{source} is not a file, a folder, an address with https:// or a version.") from None
    return wheels_in(folder)


def wheels_in(folder: Path) -> dict[str, Wheel]:
    """Return the wheels in a folder, by package; none if there is no such folder."""
    return {wheel.package: wheel for wheel in map(Wheel, sorted(folder.glob("*.whl")))}


def wheels_named(root: Path, name: str) -> dict[str, Wheel]:
    """Return the wheels in `vendor/` that a file of a project names, by package; none if there is no such file."""
    text = read_text(root / name) if (root / name).exists() else ""
    return {wheel.package: wheel for wheel in (Wheel(root / "vendor" / file) for file in NAME_OF_WHEEL.findall(text))}


def rename_wheels(text: str, wheels: dict[str, Wheel]) -> str:
    """Return the text of a project's file with the names of these wheels in place of others of the same packages."""

    def rename(found: re.Match[str]) -> str:
        wheel = wheels.get(Wheel(Path(found[1])).package)
        return wheel.source if wheel else found[0]

    return NAME_OF_WHEEL.sub(rename, text)


def _download(wanted: str, folder: Path) -> None:
    """Let pip download a wheel: it reads the user's configuration of package indexes, and trusts the system's store."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--no-input", "--only-binary", ":all:", "--dest", str(folder), wanted]
    done = subprocess.run(command, env=child_environment("PIP_", *NETWORK), capture_output=True, text=True, check=False)
    if done.returncode:
        advice = "" if "://" in wanted else "\nOnly pip's own index is asked, not that of uv. Name the wheel instead."
        text = f"{wanted} cannot be downloaded.\n{done.stderr.strip()}{advice}"
        raise ConfigurationError(re.sub(r"(?<=//)[^/\s]*(?=@)|(?<=\?)\S+", "***", text))  # less passwords
