"""The `environment` of an asset: a dependency group of pyproject.toml, or an interpreter on the supercomputer."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packaging.dependency_groups import resolve_dependency_groups
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from dagster_sbatch.environments.lockfile import LockFile, read_lock
from dagster_sbatch.errors import ConfigurationError, nearest
from dagster_sbatch.project import Project
from dagster_sbatch.setting_paths import check_remote_path
from dagster_sbatch.text_file import read_text

DEFAULT = ""  # stands for the group `cluster`, which assets use that name no environment
GROUP = "cluster"
PREFIX = f"{GROUP}-"


def is_path(environment: str | None) -> bool:
    """Return whether `environment` is a path, and not the name of a group."""
    return environment is not None and ("/" in environment or environment.startswith(("~", "$", ".")))


def lock_path(project: Project, environment: str | None) -> Path:
    """Return the lock file of a group; None and DEFAULT stand for the group `cluster`."""
    return project.root / "requirements" / f"{PREFIX}{environment}.txt" if environment else project.lock


def find_groups(root: Path) -> list[str]:
    """Return the names of the environments of a project, sorted: `torch` for the group `cluster-torch`.

    Raises ConfigurationError: pyproject.toml cannot be read.
    """
    return sorted(name.removeprefix(PREFIX) for name in _read_groups(root) if name.startswith(PREFIX))


def check_environment(environment: object, project: Project) -> None:
    """Check what an asset passes as `environment`, without the supercomputer.

    Raises ConfigurationError: it is neither a valid path nor a group of the project, or the group's lock file is
    missing or not up to date.
    """
    if environment is None:
        return
    if not isinstance(environment, str):
        raise ConfigurationError(
            f"environment={environment!r} is not a string. Write for instance environment='torch'."
        )
    if is_path(environment):
        try:
            check_remote_path(environment)
        except ValueError as error:
            raise ConfigurationError(f"environment: {error}") from None
        return
    groups = find_groups(project.root)
    if environment not in groups:
        hint = nearest(environment, groups)
        raise ConfigurationError(
            f"environment={environment!r} is not an environment of this project{hint}\n"
            "Each one is a dependency group of pyproject.toml, such as `cluster-torch` for 'torch', which scripts/lock "
            "locks. To use an interpreter that exists on the supercomputer, write its absolute path."
        )
    read_group(project, environment)


def read_pyproject(root: Path) -> dict[str, Any]:
    """Read the pyproject.toml of a project; empty if it has none.

    Raises ConfigurationError: it cannot be read.
    """
    path = root / "pyproject.toml"
    try:
        return tomllib.loads(read_text(path)) if path.is_file() else {}
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} cannot be read: {error}. Correct the file.") from None


def find_requirements(root: Path) -> set[str]:
    """Return the names of the packages that a project requires itself, for this machine and the supercomputer.

    Raises ConfigurationError: pyproject.toml cannot be read, or one of its lists is missing.
    """
    try:
        project = read_pyproject(root)["project"]
        texts = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
        return {canonicalize_name(Requirement(text).name) for text in (*texts, *_resolve(_read_groups(root), GROUP))}
    except (KeyError, TypeError, InvalidRequirement) as error:
        raise ConfigurationError(
            f"{root}/pyproject.toml: the dependencies of [project], its extra `dev` or the group `{GROUP}` cannot be "
            f"read: {error}. Correct the file."
        ) from None


def read_group(project: Project, environment: str | None, python: str | None = None) -> LockFile:
    """Read the lock file of a group.

    `environment`: the group; None and DEFAULT stand for the group `cluster`. `python`: an interpreter that has the
    packages: then it does not count what the group requires.
    Raises ConfigurationError: see `read_lock`; or the file lacks a requirement that the group has in pyproject.toml.
    """
    lock, groups = read_lock(lock_path(project, environment)), _read_groups(project.root)
    group = f"{PREFIX}{environment}" if environment else GROUP
    if group in groups and not python:
        _check_current(lock, groups, group)
    return lock


def _check_current(lock: LockFile, groups: Mapping[str, list[Any]], group: str) -> None:
    """Refuse a lock file without one of a group's requirements; those with a marker may be for other machines."""
    versions: dict[str, list[str]] = {}
    for pin in lock.pins:
        versions.setdefault(pin.name, []).extend(each.version for each in Requirement(pin.text).specifier)
    for requirement in map(Requirement, _resolve(groups, group)):
        found = versions.get(canonicalize_name(requirement.name), [])
        fits = any(requirement.specifier.contains(each, prereleases=True) for each in found)
        if not fits and requirement.marker is None:
            there = f"{requirement.name} {', '.join(found)}" if found else f"no {requirement.name}"
            raise ConfigurationError(
                f"{lock.path} is out of date. The group {group} of pyproject.toml requires {requirement}, and the file "
                f"has {there}. Lock the packages again:\nscripts/lock"
            )


def _resolve(groups: Mapping[str, Any], group: str) -> tuple[str, ...]:
    """Return the requirements of a group, with those of the groups that it includes."""
    try:
        return resolve_dependency_groups(groups, group)
    except ExceptionGroup as error:
        problems = "; ".join(map(str, error.exceptions))
        raise ConfigurationError(f"pyproject.toml: {error.message}: {problems}. Correct [dependency-groups].") from None


def _read_groups(root: Path) -> dict[str, list[Any]]:
    """Return the dependency groups of a project by normalised name; none without a pyproject.toml."""
    groups = read_pyproject(root).get("dependency-groups", {})
    if not isinstance(groups, dict):
        raise ConfigurationError(f"{root}/pyproject.toml: dependency-groups is not a table. Write [dependency-groups].")
    return {canonicalize_name(name): group for name, group in groups.items()}
