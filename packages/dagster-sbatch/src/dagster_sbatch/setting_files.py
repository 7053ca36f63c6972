"""Where settings come from, and whether they are complete.

The first of these that has a value that is not blank wins:

1. the process environment
2. `.env` at the root of the repository
3. one file of `envs/`: `.env.development`, or for the `*_supercomputer` deployments `.env.<site>`
"""

import io
import logging
import os
import shlex
import stat
from collections.abc import Collection, Mapping
from pathlib import Path

from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from dagster_sbatch.errors import ConfigurationError, NoSettingsFileError, Place, describe_at, nearest
from dagster_sbatch.setting_paths import BRACES, check_remote_path, expand_here
from dagster_sbatch.settings import DEPLOYMENTS, Settings
from dagster_sbatch.text_file import read_text

logging.getLogger("dotenv.main").addHandler(logging.NullHandler())  # it warns of such lines, without the file's name
_OWN_PREFIXES = ("SLURM_", "ASC_", "DAGSTER_DEPLOYMENT")
"""An unknown variable of a dotenv file with one of these prefixes is an error."""
_REMOTE_PATHS = ("deployment_base_path", "data_root", "python")
NEEDED_FOR_SSH = ("edge_node_user", "edge_node_key_path")
REQUIRED_ON_SUPERCOMPUTER = ("supercomputer_site", "edge_node_host", *NEEDED_FOR_SSH, "deployment_base_path")


def load_settings(sites: Collection[str], root: Path, supercomputer: bool = False) -> Settings:
    """Read the settings from their layers (see the top of this module).

    `supercomputer`: read the settings of a supercomputer, also if the deployment is `development` or not set: for
    commands and sensors that connect to it.
    Raises ConfigurationError: everything that is missing or wrong, at once, with names and examples; a dotenv file with
    a secret that others can read; several files for a supercomputer that is not named.
    Raises NoSettingsFileError: something is missing, and there is no file for the supercomputer.
    """
    known = {**_values(root / ".env"), **_not_blank(os.environ)}
    file = _choose_file(root / "envs", known, sites, supercomputer)
    problems = [problem for path in (file, root / ".env") for problem in _problems(path)]
    try:
        settings = Settings.model_validate({**_values(file), **known})
    except ValidationError as error:
        wrong = describe_at(error, lambda place: str(place[0]), advice=_advice)
        raise ConfigurationError("\n".join([*problems, wrong])) from None
    site = settings.supercomputer_site
    if site and site not in sites:
        problems.append(f"SLURM_SUPERCOMPUTER_SITE={site!r} is not a known site{nearest(site, sites)}")
    if settings.data_root is not None:  # a path on this machine in `development`
        try:
            (check_remote_path if settings.on_supercomputer else expand_here)(settings.data_root)
        except ValueError as error:
            problems.append(f"DATA_ROOT: {error}")
    unset = [name for name in ("budget_gpu_hours", "budget_start") if getattr(settings, name) is None]
    if len(unset) == 1:
        name = _alias(Settings.model_fields[unset[0]])
        problems.append(f"{name} is not set: a budget has an amount and a first day. {_advice((name,))}")
    if settings.on_supercomputer or supercomputer:
        problems.extend(_missing(settings, file))
    if problems:
        raise (ConfigurationError if file.is_file() else NoSettingsFileError)("\n".join(problems))
    return settings


def _alias(field: FieldInfo) -> str:
    return str(field.validation_alias)


def _choose_file(folder: Path, values: Mapping[str, str], sites: Collection[str], supercomputer: bool) -> Path:
    """Return the one file of envs/ to read, from the deployment and the site, as far as the other layers name them."""
    deployment, site = values.get("DAGSTER_DEPLOYMENT"), values.get("SLURM_SUPERCOMPUTER_SITE")
    if deployment and deployment not in DEPLOYMENTS:
        raise ConfigurationError(f"DAGSTER_DEPLOYMENT={deployment!r} is unknown; valid are {', '.join(DEPLOYMENTS)}")
    if not supercomputer and (deployment == "development" or not (deployment or site)):
        return folder / ".env.development"
    if site:
        return folder / f".env.{site}"
    there = [folder / f".env.{name}" for name in sorted(sites) if (folder / f".env.{name}").is_file()]
    if len(there) == 1:
        return there[0]
    who = f"DAGSTER_DEPLOYMENT={deployment}" if deployment else "This command or sensor"
    if there:
        raise ConfigurationError(
            f"{who} needs SLURM_SUPERCOMPUTER_SITE, because {folder} has several files: "
            f"{', '.join(path.name for path in there)}. Set it to one of {', '.join(sorted(sites))}."
        )
    raise NoSettingsFileError(
        f"{who} needs the settings of a supercomputer ({', '.join(sorted(sites))}), and {folder} has no file for one. "
        "Copy the example and fill it in:\n"
        "  cp envs/.env.musica.example envs/.env.musica && chmod 600 envs/.env.musica"
    )


def _not_blank(values: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in values.items() if value}


def _values(path: Path) -> dict[str, str]:
    return _not_blank(dotenv_values(stream=io.StringIO(read_text(path)))) if path.is_file() else {}


def find_overridden(root: Path) -> list[str]:
    """Return the variables of this process that `.env` sets to other values: Dagster's commands would use those."""
    read = {"DAGSTER_HOME", *map(_alias, Settings.model_fields.values())}
    found = {name: value for name, value in dotenv_values(root / ".env").items() if value is not None}
    return sorted(name for name in read & found.keys() if (os.environ.get(name) or found[name]) != found[name])


def _problems(path: Path) -> list[str]:
    """Return the problems of a dotenv file: unknown lines and variables, open secrets, variables in braces."""
    values = _values(path)
    fields = {_alias(field): field for field in Settings.model_fields.values()}
    unknown = [name for name in values if name not in fields and name.upper().startswith(_OWN_PREFIXES)]
    lines = parse_stream(io.StringIO(read_text(path) if path.is_file() else ""))
    wrong = "this is not NAME=value, or lacks a quotation mark"
    problems = [f"{path}, line {line.original.line}: {wrong}" for line in lines if line.error]
    problems += [f"{path}: unknown variable {name}{nearest(name.upper(), fields)}" for name in unknown]
    secrets = [name for name in values if name in fields and fields[name].annotation == (SecretStr | None)]
    if secrets and stat.S_IMODE(path.stat().st_mode) & 0o077:
        problems.append(f"{path} holds {', '.join(secrets)}; others can read it:\n  chmod 600 {shlex.quote(str(path))}")
    raw = dotenv_values(path, interpolate=False) if path.is_file() else {}
    for name in (_alias(Settings.model_fields[field]) for field in _REMOTE_PATHS):
        if found := BRACES.search(raw.get(name) or ""):
            problems.append(f"{path}: {name}: {found[0]} would get the value on this machine. Write ${found[1]}")
    return problems


def _missing(settings: Settings, file: Path) -> list[str]:
    required = [name for name in REQUIRED_ON_SUPERCOMPUTER if not (settings.on_login_node and name in NEEDED_FOR_SSH)]
    lacking = [Settings.model_fields[name] for name in required if getattr(settings, name) is None]
    examples = [f"  {_alias(field)}={(field.examples or [''])[0]}   # {field.description}" for field in lacking]
    head = (
        "A deployment on a supercomputer needs more variables. They are not set, neither in the environment nor in "
        f"{file}. For example:"
    )
    if settings.edge_node_host == "localhost" and not settings.on_login_node:
        head = (
            "SLURM_EDGE_NODE_HOST=localhost, and there is no sbatch on the PATH of this process, so Dagster would log "
            f"in by SSH. On a login node, load Slurm's module before you start Dagster, or extend PATH. {head}"
        )
    return [head, *examples] if lacking else []


def _advice(place: Place) -> str:
    """Return what a variable is for, with an example."""
    field = next(field for field in Settings.model_fields.values() if _alias(field) == place[0])
    return f"{field.description} Example: {(field.examples or [''])[0]}"
