"""Every environment variable that the project reads, with its type, meaning and default; and the files they come from.

The first of these that has a value that is not blank wins:

1. the process environment
2. `.env` at the root of the repository
3. one file of `envs/`: `.env.development`, or for the `*_supercomputer` deployments `.env.<site>`
"""

import ipaddress
import os
import shutil
import stat
from collections.abc import Collection, Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from dotenv import dotenv_values
from pydantic import AfterValidator, Field, SecretStr, ValidationError, ValidationInfo
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from dagster_sbatch.errors import ConfigurationError, Place, describe_at, nearest
from dagster_sbatch.setting_paths import BRACES, check_remote_path, expand_here

Deployment = Literal["development", "staging_supercomputer", "production_supercomputer"]
DEPLOYMENTS: tuple[str, ...] = get_args(Deployment)

_OWN_PREFIXES = ("SLURM_", "ASC_", "DAGSTER_DEPLOYMENT")
"""An unknown variable of a dotenv file with one of these prefixes is an error."""


def _expanded(path: Path) -> Path:
    return path.expanduser()


def _https(url: str, values: ValidationInfo) -> str:
    """Check an address: https, since secrets go there; http to this machine only, or with ASC_ALLOW_HTTP."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise ValueError(f"not a URL: {error}") from None
    if parts.scheme not in ("https", "http") or not parts.hostname:
        raise ValueError("not a URL: it begins with https://")
    if parts.scheme == "http" and not values.data.get("allow_http") and not _is_loopback(parts.hostname):
        raise ValueError("plain http would show secrets to everyone on the way: use https://")
    return url


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


SLURM_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"
_REMOTE_PATHS = ("deployment_base_path", "data_root", "python")

LocalPath = Annotated[Path, AfterValidator(_expanded)]
RemotePath = Annotated[str, AfterValidator(check_remote_path)]
Url = Annotated[str, AfterValidator(_https)]


def _variable(name: str, description: str, example: str, default: Any = None, **limits: Any) -> Any:
    return Field(default, validation_alias=name, description=description, examples=[example], **limits)


class Settings(BaseSettings):
    """The settings of one deployment; `load_settings` makes them."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", case_sensitive=True, env_ignore_empty=True)

    deployment: Deployment = _variable(
        "DAGSTER_DEPLOYMENT",
        "Where workloads run: " + ", ".join(DEPLOYMENTS) + ".",
        "production_supercomputer",
        "development",
    )
    data_root: str | None = _variable(
        "DATA_ROOT",
        "Folder for the workloads' files. Default: data/ of the repository, or of SLURM_DEPLOYMENT_BASE_PATH.",
        "~/data",
    )

    supercomputer_site: str | None = _variable("SLURM_SUPERCOMPUTER_SITE", "Name of the supercomputer.", "musica")
    edge_node_host: str | None = _variable(
        "SLURM_EDGE_NODE_HOST", "Name of the login node; localhost if Dagster runs on it.", "musica.vie.asc.ac.at"
    )
    edge_node_port: int = _variable("SLURM_EDGE_NODE_PORT", "SSH port of the login node.", "22", 22, ge=1, le=65535)
    edge_node_user: str | None = _variable("SLURM_EDGE_NODE_USER", "Your user name on the supercomputer.", "xy12345")
    edge_node_key_path: LocalPath | None = _variable(
        "SLURM_EDGE_NODE_KEY_PATH", "Private SSH key; its certificate is the file beside it.", "~/.ssh/id_musica"
    )
    deployment_base_path: RemotePath | None = _variable(
        "SLURM_DEPLOYMENT_BASE_PATH",
        "Folder on the supercomputer for runs, environments and data; every node must see it.",
        "$DATA/dagster-slurm",
    )
    python: RemotePath | None = _variable(
        "SLURM_PYTHON",
        "An interpreter on the supercomputer that has dagster-pipes and everything that workloads import. "
        "Not used by assets that name an environment. Default: the client makes an environment.",
        "$DATA/environment/bin/python",
    )
    partition: str | None = _variable(
        "SLURM_PARTITION",
        "Preferred partition. A request that needs the other kind (with GPUs, without) gets a partition of that kind.",
        "zen4_0768_h100x4",
    )
    qos: str | None = _variable(
        "SLURM_QOS",
        "Preferred QoS. On another partition, jobs use the QoS of the same class (dev_, idle_, plain).",
        "dev_zen4_0768_h100x4",
    )
    account: str | None = _variable(
        "SLURM_ACCOUNT",
        "Project that jobs are charged to, unless an asset names one. "
        "Default: SBATCH_ACCOUNT of the login shell on the supercomputer, else your default project.",
        "p71234",
        pattern=SLURM_NAME,
    )
    reservation: str | None = _variable(
        "SLURM_RESERVATION",
        "Reservation of the site in which jobs run, unless an asset names one.",
        "course_2026",
        pattern=SLURM_NAME,
    )
    most_gpu_hours_per_run: float | None = _variable(
        "SLURM_MOST_GPU_HOURS_PER_RUN",
        "GPU-hours that one call of compute.run may cost; a call that could cost more submits nothing. "
        "An asset may name its own limit.",
        "64",
        ge=0,
        allow_inf_nan=False,
    )
    most_node_hours_per_run: float | None = _variable(
        "SLURM_MOST_NODE_HOURS_PER_RUN", "The same for node-hours.", "100", ge=0, allow_inf_nan=False
    )
    budget_gpu_hours: float | None = _variable(
        "SLURM_BUDGET_GPU_HOURS",
        "GPU-hours that the project of your jobs may use from SLURM_BUDGET_START on. "
        "Not used where Slurm itself limits what the project may use.",
        "5000",
        ge=0,
        allow_inf_nan=False,
    )
    budget_start: date | None = _variable(
        "SLURM_BUDGET_START", "First day (UTC) of SLURM_BUDGET_GPU_HOURS.", "2026-10-01"
    )
    keep_within_budget: bool = _variable(
        "SLURM_KEEP_WITHIN_BUDGET",
        "Submit nothing that could cost more GPU-hours or node-hours than the project has left, after all jobs that "
        "wait and run.",
        "true",
        default=False,
    )

    allow_http: bool = _variable(  # before the addresses, whose check reads it
        "ASC_ALLOW_HTTP",
        "Accept http:// in the ASC_ addresses also for other machines. Secrets are then readable on the network: "
        "for tests.",
        "true",
        default=False,
    )
    oidc_client_id: str | None = _variable("ASC_OIDC_CLIENT_ID", "Client id of the step CA at authentik.", "abc123")
    oidc_username: str | None = _variable("ASC_OIDC_USERNAME", "Your user name at authentik.", "xy12345")
    oidc_token_url: Url | None = _variable(
        "ASC_OIDC_TOKEN_URL", "Address that issues OIDC tokens.", "https://auth.asc.ac.at/application/o/token/"
    )
    oidc_app_password: SecretStr | None = _variable(
        "ASC_OIDC_APP_PASSWORD", "An app password of yours; one of the ways to get access.", "(secret)"
    )
    authentik_api_base: Url | None = _variable(
        "ASC_AUTHENTIK_API_BASE", "Address of authentik.", "https://auth.asc.ac.at"
    )
    authentik_credentials_file: LocalPath | None = _variable(
        "ASC_AUTHENTIK_CREDENTIALS_FILE",
        "File with the credentials that renew themselves. Default: ~/.config/musica-pipelines/<site>-auth.env.",
        "~/.config/dagster-slurm/musica-auth.env",
    )
    authentik_api_token: SecretStr | None = _variable(
        "ASC_AUTHENTIK_API_TOKEN", "An API token of yours, for the first time and for recovery only.", "(secret)"
    )
    authentik_token_identifier: str = _variable(
        "ASC_AUTHENTIK_TOKEN_IDENTIFIER",
        "Prefix of the names of the tokens that the client makes for you: letters, digits, _ and -.",
        "dagster-slurm",
        "musica-pipelines",
        pattern=r"^[A-Za-z0-9_-]{1,80}$",
    )
    authentik_refresh_skew_days: float | None = _variable(
        "ASC_AUTHENTIK_REFRESH_SKEW_DAYS",
        "Days before they expire when both stored secrets are replaced. "
        "Default: 7, or a third of their lifetime if that is less.",
        "3",
        gt=0,
    )
    step_ca_url: Url | None = _variable("ASC_STEP_CA_URL", "The certificate authority.", "https://auth.asc.ac.at:9000")
    step_fingerprint: str | None = _variable(
        "ASC_STEP_FINGERPRINT",
        "SHA-256 of the certificate authority's root certificate.",
        "44b04847...",
        pattern=r"^[0-9a-fA-F]{64}$",
    )
    step_refresh_skew: float | None = _variable(
        "ASC_STEP_REFRESH_SKEW",
        "Minutes before it expires when the certificate is replaced. Default: after two thirds of its life.",
        "60",
        gt=0,
    )

    @property
    def on_supercomputer(self) -> bool:
        """Whether workloads run as Slurm jobs."""
        return self.deployment != "development"

    @property
    def on_login_node(self) -> bool:
        """Whether this machine is the login node: Slurm is here, and no SSH needed."""
        return self.edge_node_host == "localhost" and shutil.which("sbatch") is not None

    @property
    def credentials_file(self) -> Path:
        """ASC_AUTHENTIK_CREDENTIALS_FILE or its default."""
        default = Path(f"~/.config/musica-pipelines/{self.supercomputer_site}-auth.env")
        return self.authentik_credentials_file or default.expanduser()


NEEDED_FOR_SSH = ("edge_node_user", "edge_node_key_path")
REQUIRED_ON_SUPERCOMPUTER = ("supercomputer_site", "edge_node_host", *NEEDED_FOR_SSH, "deployment_base_path")


def load_settings(sites: Collection[str], root: Path, supercomputer: bool = False) -> Settings:
    """Read the settings from their layers (see the top of this module).

    Args:
        sites: the names of the known sites.
        root: the folder with `.env` and `envs/`.
        supercomputer: read the settings of a supercomputer, also if the deployment is `development` or not set: for
            commands and sensors that connect to it.

    Raises:
        ConfigurationError: everything that is missing or wrong, at once, with names and examples; a dotenv file with a
            secret that others can read; no file or several files for a supercomputer that is not named.
    """
    known = {**_values(root / ".env"), **_not_blank(os.environ)}
    file = _choose_file(root / "envs", known, sites, supercomputer)
    files = (file, root / ".env")  # the later one wins, and the process environment over both
    problems = [problem for path in files for problem in _problems(path)]
    try:
        settings = Settings(_env_file=files)
    except ValidationError as error:
        wrong = describe_at(error, lambda place: str(place[0]), advice=_advice)
        raise ConfigurationError("\n".join([*problems, wrong])) from None
    site = settings.supercomputer_site
    if site and site not in sites:
        problems.append(f"SLURM_SUPERCOMPUTER_SITE={site!r} is not a known site{nearest(site, sites)}")
    problems.extend(_data_root_problems(settings))
    problems.extend(_budget_problems(settings))
    if settings.on_supercomputer or supercomputer:
        problems.extend(_missing(settings, file))
    if problems:
        raise ConfigurationError("\n".join(problems))
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
    choices = ", ".join(sorted(sites))
    found = (
        f"there are several: {', '.join(path.name for path in there)}" if there else f"{folder} has no .env.<site> file"
    )
    raise ConfigurationError(
        f"{f'DAGSTER_DEPLOYMENT={deployment}' if deployment else 'This'} needs SLURM_SUPERCOMPUTER_SITE ({choices}), "
        f"or exactly one file envs/.env.<site>; {found}. Copy the example and fill it in:\n"
        "  cp envs/.env.musica.example envs/.env.musica"
    )


def _not_blank(values: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in values.items() if value}


def _values(path: Path) -> dict[str, str]:
    return _not_blank(dotenv_values(path)) if path.is_file() else {}


def _problems(path: Path) -> list[str]:
    """Return the problems of a dotenv file: unknown variables, secrets that others can read, variables in braces."""
    values = _values(path)
    fields = {_alias(field): field for field in Settings.model_fields.values()}
    unknown = [name for name in values if name not in fields and name.startswith(_OWN_PREFIXES)]
    problems = [f"{path}: unknown variable {name}{nearest(name, fields)}" for name in unknown]
    secrets = [name for name in values if name in fields and fields[name].annotation == (SecretStr | None)]
    if secrets and stat.S_IMODE(path.stat().st_mode) & 0o077:
        problems.append(f"{path} holds {', '.join(secrets)} and others can read it: chmod 600 '{path}'")
    raw = dotenv_values(path, interpolate=False) if path.is_file() else {}
    for name in (_alias(Settings.model_fields[field]) for field in _REMOTE_PATHS):
        if found := BRACES.search(raw.get(name) or ""):
            problems.append(
                f"{path}: {name}: {found[0]} would be replaced by this machine's variable. Write ${found[1]}"
            )
    return problems


def _data_root_problems(settings: Settings) -> list[str]:
    """Return the problem of DATA_ROOT, which is a path on this machine in `development`."""
    if settings.data_root is None:
        return []
    try:
        (check_remote_path if settings.on_supercomputer else expand_here)(settings.data_root)
    except ValueError as error:
        return [f"DATA_ROOT: {error}"]
    return []


def _budget_problems(settings: Settings) -> list[str]:
    """Return the problem of a budget that is set by half."""
    names = ("budget_gpu_hours", "budget_start")
    missing = [name for name in names if getattr(settings, name) is None]
    if len(missing) != 1:
        return []
    field = Settings.model_fields[missing[0]]
    return [f"{_alias(field)} is not set: a budget has an amount and a first day. {_advice((_alias(field),))}"]


def _missing(settings: Settings, file: Path) -> list[str]:
    required = [name for name in REQUIRED_ON_SUPERCOMPUTER if not (settings.on_login_node and name in NEEDED_FOR_SSH)]
    lacking = [Settings.model_fields[name] for name in required if getattr(settings, name) is None]
    examples = [f"  {_alias(field)}={(field.examples or [''])[0]}   # {field.description}" for field in lacking]
    head = (
        "A deployment on a supercomputer needs more variables. They are not set, neither in the environment nor in "
        f"{file}. For example:"
    )
    return [head, *examples] if lacking else []


def _advice(place: Place) -> str:
    """Return what a variable is for, with an example."""
    field = next(field for field in Settings.model_fields.values() if _alias(field) == place[0])
    return f"{field.description} Example: {(field.examples or [''])[0]}"
